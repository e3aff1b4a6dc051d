"""Products of quantised matrices where the device casts no FP8 (Ascend 910) or multiplies no FP64: the operands are
decoded from their bytes and multiplied in FP32. On any device; for numerics, not for speed.
"""

from functools import partial

import torch

from octofold.kernels.fp8_bits import decode, decode_scale
from octofold.kernels.qtensor import QTensor, spread
from octofold.kernels.reference.scaled_mm import group_by_group, group_by_group_inner
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
    assert accumulation == "fp32", accumulation
    return group_by_group(partial(scaled_mm, out_dtype=out_dtype), a_NK, b_EFK, counts_E, out_dtype)


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py; waits for the counts."""
    assert accumulation == "fp32", accumulation
    return group_by_group_inner(partial(scaled_mm, out_dtype=out_dtype), a_FT, b_DT, counts_E, out_dtype)
