"""Products of quantised matrices where the device casts no FP8 (Ascend 910) or multiplies no FP64: the operands are
decoded from their bytes and multiplied in FP32. On any device; for numerics, not for speed.
"""

import torch

from octofold.kernels.fp8_bits import decode, decode_scale
from octofold.kernels.qtensor import QTensor, spread
from octofold.kernels.reference.quantize import GROUP_UNIT
from octofold.kernels.reference.scaled_mm import columns_of, matrix_of, rows_of
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any format."""
    return None if workload.accumulation == "fp32" else "it sums in FP32, not as Hopper does (hopper)"


def dequantize(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    return (decode(x.data) * spread(decode_scale(x.scale), x.format.tile, x.shape)).to(dtype)


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py, with sums in FP32."""
    assert accumulation == "fp32", accumulation
    return (dequantize(a, torch.float32) @ dequantize(b, torch.float32).mT).to(out_dtype)


def scaled_grouped_mm(
    a_NK: QTensor,
    b_EFK: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py; waits for the counts."""
    out_NF = a_NK.scale.new_empty(a_NK.shape[0], b_EFK.shape[1], dtype=out_dtype)
    start = 0
    for group, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        out_NF[rows] = scaled_mm(
            rows_of(a_NK, rows), matrix_of(b_EFK, group), out_dtype=out_dtype, accumulation=accumulation
        )
        start += count
    return out_NF


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py; waits for the counts."""
    unit = a_FT.format.tile[1] or GROUP_UNIT
    out_EFD = a_FT.scale.new_empty(len(counts_E), a_FT.shape[0], b_DT.shape[0], dtype=out_dtype)
    first = 0
    for group, count in enumerate(counts_E.tolist()):
        tiles = -(-count // unit)
        columns = (first * unit, (first + tiles) * unit)
        out_EFD[group] = scaled_mm(
            columns_of(a_FT, *columns), columns_of(b_DT, *columns), out_dtype=out_dtype, accumulation=accumulation
        )
        first += tiles
    return out_EFD
