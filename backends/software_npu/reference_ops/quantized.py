"""MX quantisation and its products: npu_dynamic_mx_quant, npu_quant_matmul, FP8 in npu_grouped_matmul.

Legend: R rows, C columns, T pairs of tiles; M, N rows of operands, K what is summed over, E groups.

Infinities and NaN give the tile a scale of NaN, zeros the least scale: the documentation is silent on both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, unknown

DTYPES = {23: torch.float8_e5m2, 24: torch.float8_e4m3fn, 291: torch.float8_e5m2, 292: torch.float8_e4m3fn}
OUT_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
BIAS, NAN = 127, 255
"""Of e8m0."""
E8M0 = 293
"""torch_npu's code of the dtype."""


def dynamic_mx_quant(
    x: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """FP8 numbers [..., C], and uint8 exponents of the scales [..., T, 2], rounded up (`scale_alg` 1)."""
    if (
        axis not in (-1, x.dim() - 1)
        or dst_type not in DTYPES
        or scale_alg != 1
        or round_mode != "rint"
        or dst_type_max
    ):
        raise unknown("npu_dynamic_mx_quant", f"axis={axis} dst_type={dst_type} scale_alg={scale_alg}")
    if x.dtype == torch.float32 and (block_size != 32 or x.shape[-1] < 32):
        raise unknown("npu_dynamic_mx_quant", f"float32 in blocks of {block_size} along {x.shape[-1]}")
    dtype = DTYPES[dst_type]
    tiles = -(-x.shape[-1] // (2 * block_size)) * 2
    padded = torch.nn.functional.pad(x.float(), (0, tiles * block_size - x.shape[-1])).unflatten(
        -1, (tiles, block_size)
    )
    amax = padded.abs().amax(-1).clamp(min=max_low_bound)
    mantissa, exponent = torch.frexp(amax / torch.finfo(dtype).max)
    exponent = exponent - (mantissa == 0.5).int()
    code = torch.where(amax == 0, 0, (exponent + BIAS).clamp(0, NAN - 1))
    scale = torch.ldexp(torch.ones_like(amax), code - BIAS)
    data = (padded / scale[..., None]).to(dtype).flatten(-2)[..., : x.shape[-1]].contiguous()
    code = torch.where(amax.isfinite(), code, NAN)
    return data, code.to(torch.uint8).unflatten(-1, (tiles // 2, 2))


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    output_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    **others: Any,
) -> Tensor:
    """x1 [M, K] times x2 [K, N] with scales of 32 numbers along K: uint8 [M, T, 2] and [T, N, 2]."""
    codes = [others.pop(name, None) for name in ("scale_dtype", "pertoken_scale_dtype")]
    given = sorted(name for name, value in others.items() if value is not None)
    if codes != [E8M0, E8M0] or group_sizes != [1, 1, 32] or given or pertoken_scale is None:
        raise unknown("npu_quant_matmul", f"group_sizes={group_sizes} {given}")
    if output_dtype not in OUT_DTYPES:
        raise unknown("npu_quant_matmul", f"output_dtype={output_dtype}")
    left = _scaled(x1, pertoken_scale.flatten(1))
    right = _scaled(x2.t(), scale.transpose(0, 1).flatten(1))
    return (left @ right.t()).to(OUT_DTYPES[output_dtype])


def quantized_rows(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: list[Tensor],
    per_token_scale: list[Tensor],
    ends: list[int],
    output_dtype: int,
) -> list[Tensor]:
    """npu_grouped_matmul: rows [M, K] of each group times its [K, N]; uint8 scales [M, T, 2] and [E, T, N, 2]."""
    rows = _scaled(x[0], per_token_scale[0].flatten(1))
    result = rows.new_zeros(len(rows), weight[0].shape[2])
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        matrix = _scaled(weight[0][group].t(), scale[0][group].transpose(0, 1).flatten(1))
        result[start:end] = rows[start:end] @ matrix.t()
    return [result.to(OUT_DTYPES[output_dtype])]


def _scaled(data_RC: Tensor, codes: Tensor) -> Tensor:
    """FP64."""
    scale = torch.ldexp(torch.ones(codes.shape, dtype=torch.float64), codes.int() - BIAS)
    scale = torch.where(codes == NAN, torch.nan, scale).repeat_interleave(32, 1)
    return data_RC.double() * scale[:, : data_RC.shape[1]]


KERNELS: Kernels = {"npu_dynamic_mx_quant": dynamic_mx_quant, "npu_quant_matmul": quant_matmul}
"""Operator -> its kernel."""
