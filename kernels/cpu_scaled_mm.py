"""Products of quantised matrices on CPUs: dequantised to BF16 and multiplied there, with sums in FP32.

An E4M3 or E5M2 number times a power of two is exact in BF16, so with such scales the result is the FP8 product up to
the rounding of its output. With FP32 scales each operand is rounded to BF16 as well (2^-8 relative at most). FP32
results come from FP32 products of operands that are not rounded.
"""

import torch

from octofold.kernels.cpu_grouped_mm import rows_mm
from octofold.kernels.cpu_products import matmul, matmul_into
from octofold.kernels.qtensor import E4M3, E8M0, QTensor, spread
from octofold.kernels.reference.quantize import GROUP_UNIT
from octofold.kernels.registry import Workload

E4M3_BITS = -30736
"""Sign, exponent and mantissa of an E4M3 number that was moved left by four: 0x87F0."""
E4M3_BIAS = 2.0**120
"""What a number with E4M3's exponent bits and BF16's bias is too small by."""


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory, with BF16 results."""
    if workload.device_type != "cpu":
        return f"made for CPUs, the run is on {workload.device_type}"
    if workload.accumulation != "fp32":
        return f"adds in FP32, not as {workload.accumulation}"
    return None


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    return matmul(dequantize(a, out_dtype), dequantize(b, out_dtype).mT)


def scaled_grouped_mm(
    a_NK: QTensor,
    b_EFK: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    sizes = counts_E.tolist()
    a, b = dequantize(a_NK, out_dtype), dequantize(b_EFK, out_dtype)
    out_NF = a.new_empty(a.shape[0], b.shape[1])
    for rows, matrix, out in zip(a.split(sizes), b, out_NF.split(sizes), strict=True):
        rows_mm(rows, matrix.t(), out)
    return out_NF


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    unit = a_FT.format.tile[1] or GROUP_UNIT
    a_TF, b_TD = dequantize(a_FT, out_dtype).t(), dequantize(b_DT, out_dtype).t()
    out_EFD = a_TF.new_empty(len(counts_E), a_TF.shape[1], b_TD.shape[1])
    start = 0
    for out, count in zip(out_EFD, counts_E.tolist(), strict=True):
        # Filled up with zeros to whole tiles: they add nothing, and one product rounds once.
        end = start + -(-count // unit) * unit
        matmul_into(a_TF[start:end].t(), b_TD[start:end], out)
        start = end
    return out_EFD


def dequantize(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py, several times faster, in the strides of the data."""
    if not x.data.is_contiguous() and x.data.mT.is_contiguous():
        return dequantize(x.t(), dtype).mT
    if dtype != torch.bfloat16:
        return x.dequantize(dtype)
    value, bias = _values(x.data)
    if x.format.scale_dtype == E8M0:
        scale = _e8m0_values(x.scale)
        if bias != 1 and not bool((scale > torch.finfo(torch.bfloat16).max / bias).any()):
            scale, bias = scale * bias, 1.0
        return _times(value if bias == 1 else value * bias, scale.bfloat16(), x)
    return _times(value.float().mul_(bias), x.scale, x).bfloat16()


def _values(data: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Eight-bit floats without their scales as (BF16 numbers, what to multiply them with).

    Not for NaN: its tile's scale is NaN.
    """
    if data.dtype == E4M3:
        bits = data.contiguous().view(torch.int8).to(torch.int16)
        bits <<= 4
        bits &= E4M3_BITS
        return bits.view(torch.bfloat16), E4M3_BIAS
    bits = data.contiguous().view(torch.int8).to(torch.int16)
    bits <<= 8  # E5M2 is the first byte of an FP16 number.
    return bits.view(torch.float16).bfloat16(), 1.0


def _e8m0_values(scale: torch.Tensor) -> torch.Tensor:
    """FP32 (torch's own conversion is slow)."""
    exponent = scale.contiguous().view(torch.uint8).to(torch.int32)
    return torch.where(exponent == 255, torch.nan, (exponent << 23).view(torch.float32))


def _times(value: torch.Tensor, scale: torch.Tensor, x: QTensor) -> torch.Tensor:
    """Each element times its tile's scale, in place."""
    if value.numel() == 0:
        return value
    (high, wide), (rows, columns) = x.format.tile, x.shape[-2:]
    (r, c) = scale.shape[-2:]
    if (r == 1 or r * high == rows) and (c == 1 or c * wide == columns):
        value.unflatten(-1, (c, -1)).unflatten(-3, (r, -1)).mul_(scale[..., :, None, :, None])
        return value
    return value.mul_(spread(scale, x.format.tile, x.shape))
