"""FP8 numbers and their scales as bits, by integer arithmetic: for devices that cast no FP8, such as Ascend 910.

A tensor of FP8 dtype is only ever a view of uint8 here. Rounding is to nearest, ties to even, bit for bit as torch's
casts do it.
"""

import torch

from octofold.kernels.qtensor import E4M3, E5M2, E8M0, LEAST_SCALE, Format

LEAST_SCALE_BITS = 0x00800000
"""Of `LEAST_SCALE`, as FP32."""
assert LEAST_SCALE == 2.0**-126
FP32_MANTISSA, FP32_BIAS = 23, 127
LAYOUTS = {E4M3: (3, 7), E5M2: (2, 15)}
"""Bits of the mantissa, bias of the exponent."""
NAN = 0x7F


def encode(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP32 numbers as FP8.

    Args:
        x: any shape, within the largest number of `dtype`, or NaN.
        dtype: E4M3 or E5M2.

    Returns:
        uint8, the numbers' bits: `view(dtype)` makes FP8 of them.
    """
    mantissa, bias = LAYOUTS[dtype]
    dropped = FP32_MANTISSA - mantissa
    bits = x.contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    # Half a unit less one, and one more where the last bit that stays is odd: ties go to even.
    rounded = (size + ((1 << (dropped - 1)) - 1) + ((size >> dropped) & 1)) >> dropped
    normal = rounded - ((FP32_BIAS - bias) << mantissa)
    # Subnormal numbers are multiples of 2^(1 - bias - mantissa), the unit of FP32 numbers from `unit` on.
    unit = 2.0 ** (1 - bias - mantissa + FP32_MANTISSA)
    multiple = (size.view(torch.float32) + unit).view(torch.int32) - _bits(unit)
    code = torch.where(size < _bits(2.0 ** (1 - bias)), multiple, normal)
    code = torch.where(size > _bits(float("inf")), NAN, code)
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def decode(data: torch.Tensor) -> torch.Tensor:
    """FP8 numbers (E4M3 or E5M2, any shape and strides) in FP32, exactly."""
    mantissa, bias = LAYOUTS[data.dtype]
    code = data.view(torch.uint8).to(torch.int32)
    size = code & 0x7F
    normal = ((size << (FP32_MANTISSA - mantissa)) + ((FP32_BIAS - bias) << FP32_MANTISSA)).view(torch.float32)
    found = torch.where(size < 1 << mantissa, size.float() * 2.0 ** (1 - bias - mantissa), normal)
    if data.dtype == E5M2:
        found = torch.where(size == 0x7C, float("inf"), found)
    found = torch.where(size > (0x7C if data.dtype == E5M2 else 0x7E), float("nan"), found)
    return torch.where(code >= 0x80, -found, found)


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """FP32 powers of two, at least `LEAST_SCALE`, or NaN, as e8m0: the exponent's bits."""
    return ((scale.contiguous().view(torch.int32) >> FP32_MANTISSA) & 0xFF).to(torch.uint8).view(E8M0)


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales in FP32, exactly, from e8m0 or FP32."""
    if scale.dtype != E8M0:
        return scale
    exponent = scale.view(torch.uint8).to(torch.int32)
    found = (exponent << FP32_MANTISSA).clamp(min=0x00400000).view(torch.float32)
    return torch.where(exponent == 0xFF, float("nan"), found)


def powers_of_two(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """`reference.quantize.scales_of` under ue8m0: any bit of a mantissa carries into the exponent."""
    quotient = amax.clamp(min=format.least_amax) / format.largest
    bits = quotient.view(torch.int32) + 0x7FFFFF
    bits &= 0x7F800000
    scale = bits.clamp_(min=LEAST_SCALE_BITS).view(torch.float32)
    return scale.masked_fill_(quotient == 0, 1.0).masked_fill_(~torch.isfinite(amax), torch.nan)


def _bits(number: float) -> int:
    """Of an FP32 number."""
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))
