"""What FP8 numbers are, from their definition alone: the 256 codes of each format, rounding to the nearest, scales.

NumPy on exact numbers; neither torch's casts nor the code under test take part. R rows, C columns, r x c tiles.
"""

from fractions import Fraction
from functools import cache

import numpy as np
import torch

from octofold.kernels.qtensor import E4M3, E5M2, E8M0, Format, QTensor

SIGN = 0x80
FIELDS = {E4M3: (4, 3), E5M2: (5, 2)}
"""Bits of the exponent and of the mantissa; the bias is 2^(exponent bits - 1) - 1."""
LARGEST_CODE = {E4M3: 0x7E, E5M2: 0x7B}
"""Of the finite positive numbers. Above it: NaN alone (E4M3), or infinity and then NaN (E5M2)."""
SMALLEST_NORMAL_EXPONENT = 1
"""The exponent field of 2^-126, the least that a scale may be."""
SCALE_OF_NOTHING = {"ue8m0": np.float32(1), "float": np.float32(2.0**-126)}
"""Where amax ÷ the largest number is zero in FP32: the tile holds zeros, or so small numbers that they become zeros."""
NAN_SCALE_CODE = 0xFF
"""E8M0 has no other code that is not a number."""


def value_of(code: int, dtype: torch.dtype) -> Fraction:
    """The number of a finite code: (-1)^sign · 2^(exponent - bias) · 1.mantissa, or 0.mantissa if the exponent is 0."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    magnitude = code & ~SIGN
    assert magnitude <= LARGEST_CODE[dtype]
    exponent, mantissa = magnitude >> mantissa_bits, magnitude % 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    significand = Fraction(mantissa, 2**mantissa_bits) + (1 if exponent else 0)
    return (-1 if code & SIGN else 1) * significand * Fraction(2) ** (max(exponent, 1) - bias)


@cache
def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """FP64, exact: the finite numbers from 0 on; a number's place is its code."""
    return np.array([float(value_of(code, dtype)) for code in range(LARGEST_CODE[dtype] + 1)])


@cache
def midpoints(dtype: torch.dtype) -> np.ndarray:
    """FP64, exact: what lies half way between each magnitude and the next."""
    found = magnitudes(dtype)
    return (found[1:] + found[:-1]) / 2


def nearest_codes(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """uint8: the nearest number's code, ties to the even code, saturating; a code of NaN for NaN."""
    halves = midpoints(dtype)
    magnitude = np.abs(x).astype(np.float64)
    below = np.searchsorted(halves, magnitude, side="left")
    # As many midpoints lie below the magnitude as there are smaller codes; on the next one it is a tie.
    tied = (below < len(halves)) & (halves[np.minimum(below, len(halves) - 1)] == magnitude)
    code = below + (tied & (below % 2 == 1))
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), SIGN, 0)).astype(np.uint8)


def up_to_power_of_two(scale: np.float32) -> np.float32:
    """The smallest power of two that is not below a positive FP32 number, 2^-126 at least; by its exponent's bits."""
    bits = int(np.asarray(scale).view(np.uint32))
    exponent = (bits >> 23) + (1 if bits % 2**23 else 0)
    return np.float32(np.uint32(max(exponent, SMALLEST_NORMAL_EXPONENT) << 23).view(np.float32))


def scale_of(amax: np.float32, format: Format) -> np.float32:
    """FP32: amax ÷ the largest number, then the format's rounding; NaN where amax is not finite."""
    if not np.isfinite(amax):
        return np.float32(np.nan)
    scale = np.float32(max(amax, np.float32(format.least_amax))) / np.float32(magnitudes(format.dtype)[-1])
    if scale == 0:
        return SCALE_OF_NOTHING[format.scale]
    return up_to_power_of_two(scale) if format.scale == "ue8m0" else max(scale, np.float32(2.0**-126))


def tiles_along(extent: int, length: int) -> list[slice]:
    """The places of each tile in one dim; a single one where the tile is the whole of it, even of nothing."""
    return [slice(start, start + length) for start in range(0, extent, length)] if length else [slice(0, extent)]


def quantized(x_RC: np.ndarray, format: Format, given_rc: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 codes [R, C] and FP32 scales [r, c] of an FP32 matrix, tile by tile.

    Args:
        given_rc: scales from elsewhere, FP32 [r, c].
    """
    down, across = (tiles_along(*along) for along in zip(x_RC.shape, format.tile, strict=True))
    codes_RC, scales_rc = np.empty(x_RC.shape, np.uint8), np.empty((len(down), len(across)), np.float32)
    for i, rows in enumerate(down):
        for j, columns in enumerate(across):
            x = x_RC[rows, columns]
            amax = np.abs(x).max(initial=np.float32(0))
            scale = given_rc[i, j] if given_rc is not None and np.isfinite(amax) else scale_of(amax, format)
            with np.errstate(over="ignore", invalid="ignore"):
                codes_RC[rows, columns] = nearest_codes(x / scale, format.dtype)
            scales_rc[i, j] = scale
    return codes_RC, scales_rc


def decoded(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """FP64: the numbers of codes; NaN for those beyond the largest finite one."""
    found = magnitudes(dtype)
    table = np.full(SIGN, np.nan)
    table[: len(found)] = found
    return np.where(codes & SIGN, -1.0, 1.0) * table[codes & ~np.uint8(SIGN)]


def scales_of(q: QTensor) -> np.ndarray:
    """FP32 [..., r, c]: a tensor's scales, powers of two by their exponent's bits."""
    if q.scale.dtype != E8M0:
        return q.scale.numpy()
    codes = bits(q.scale)
    powers = (codes.astype(np.uint32) << 23).view(np.float32)
    return np.where(codes == NAN_SCALE_CODE, np.float32(np.nan), powers)


def dequantized(q: QTensor) -> np.ndarray:
    """FP64 [..., R, C], exact: each number times the scale of its tile."""
    data, scales = decoded(bits(q.data), q.format.dtype), scales_of(q).astype(np.float64)
    places = [
        np.arange(extent) // (length or max(extent, 1))
        for extent, length in zip(data.shape[-2:], q.format.tile, strict=True)
    ]
    return data * scales[..., places[0][:, None], places[1][None, :]]


def bits(x: torch.Tensor) -> np.ndarray:
    """uint8, of one-byte floats."""
    return x.contiguous().view(torch.uint8).numpy()


def assert_same_bits(q: QTensor, codes: np.ndarray, scales: np.ndarray, what: str) -> None:
    """Data and scales as the formula has them: every bit, save that NaN has several codes."""
    assert q.data.dtype == q.format.dtype, what
    assert q.scale.dtype == q.format.scale_dtype, what
    assert q.data.shape == codes.shape, what
    assert q.scale.shape == scales.shape, what
    assert np.array_equal(scales_of(q), scales, equal_nan=True), f"{what}: scales"
    found = bits(q.data)
    not_numbers = np.isnan(decoded(codes, q.format.dtype))
    assert np.array_equal(np.isnan(decoded(found, q.format.dtype)), not_numbers), f"{what}: NaN"
    differ = np.argwhere((found != codes) & ~not_numbers)
    assert not len(differ), f"{what}: {len(differ)} codes differ, the first at {differ[0]}"
