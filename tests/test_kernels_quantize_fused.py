"""Providers of what quantises more than a matrix as it is: rows sorted by group, and the result of a SwiGLU.

Groups are held to the formula of tests/fp8_formulas.py bit for bit. Behind a SwiGLU, FP32 rounding is left to the
provider: rounding to FP8 is monotone, so codes and scales must lie between those of the exact result moved by
`SWIGLU_ROUNDINGS` units of FP32 down and up.
"""

import math

import numpy as np
import pytest
import torch
from fp8_cases import cases, extents, implementation, normal, with_some
from fp8_formulas import SIGN, assert_same_bits, bits, dequantized, nearest_codes, quantized, scales_of

from octofold.kernels.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("poisoned")

SWIGLU_ROUNDINGS = 8
"""The exponential's error, and a rounding each for the sum, the quotient and two products."""
SWIGLU_TINY = 1e-36
"""Where silu underflows, what is left of it may be off by this times |up|."""
TO_THE_BIT = ["cpu", "bytes", "reference"]
"""Providers that compute the SwiGLU as torch does."""
GROUPS = {
    "uneven": [5, 0, 130, 1, 128, 0],
    "all to one": [0, 0, 300],
    "whole tiles": [128, 256],
    "one row each": [1, 1, 1, 1],
    "none": [0, 0, 0],
}


def padded_groups(x_ND: np.ndarray, counts: list[int], unit: int) -> np.ndarray:
    """[T·b, D], T = N // b + E: every group from the beginning of a tile on, zeros where there is nothing."""
    padded = np.zeros(((sum(counts) // unit + len(counts)) * unit, x_ND.shape[1]), np.float32)
    start = taken = 0
    for count in counts:
        padded[start : start + count] = x_ND[taken : taken + count]
        start, taken = start + math.ceil(count / unit) * unit, taken + count
    return padded


def grouped(counts: list[int], seed: int) -> np.ndarray:
    """Rows of 19 numbers whose size differs from group to group."""
    sizes = np.repeat(np.float32(10) ** np.arange(len(counts), dtype=np.float32), counts)
    return normal((sum(counts), 19), seed) * sizes[:, None]


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(("provider", "format"), cases("quantize_groups", [(1, 128), (1, 32), (1, 16), (0, 0), (1, 0)]))
def test_groups(provider, format, counts):
    """The transpose of the groups with zeros around them, in as many tiles as N and E say."""
    unit = format.tile[1] or 128
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.from_numpy(grouped(counts, 12)).to(dtype)
        padded = padded_groups(x.float().numpy(), counts, unit)
        found = implementation("quantize_groups", provider)(x, torch.tensor(counts), format)
        assert found.format == format
        assert found.shape == (19, (sum(counts) // unit + len(counts)) * unit)
        assert_same_bits(found, *quantized(np.ascontiguousarray(padded.T), format), str(dtype))


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(("provider", "format"), cases("quantize_groups", [(1, 128), (1, 32), (1, 16)]))
def test_no_tile_holds_rows_of_two_groups(provider, format, counts):
    """Each group is what `quantize` makes of it alone; all else is zero."""
    x = torch.from_numpy(grouped(counts, 12))
    found = implementation("quantize_groups", provider)(x, torch.tensor(counts), format)
    codes, scales, unit = bits(found.data), scales_of(found), format.tile[1]
    filled = np.zeros(codes.shape, bool)
    tile = 0
    for count, group in zip(counts, x.split(counts), strict=True):
        alone, alone_scales = quantized(np.ascontiguousarray(group.numpy().T), format)
        columns = slice(tile * unit, tile * unit + count)
        assert np.array_equal(codes[:, columns], alone)
        assert np.array_equal(scales[:, tile : tile + alone_scales.shape[1]], alone_scales)
        filled[:, columns] = True
        tile += alone_scales.shape[1]
    assert not codes[~filled].any()


@pytest.mark.parametrize(("provider", "format"), cases("quantize_groups", [(1, 128), (0, 0)]))
def test_groups_at_a_given_scale_and_with_a_number_that_is_none(provider, format):
    counts = [3, 0, 131]
    x_ND = with_some(normal((134, 7), 13), [1e6, math.nan])
    padded = np.ascontiguousarray(padded_groups(x_ND, counts, 128).T)
    scale = np.float32(0.25 if format.scale == "ue8m0" else 0.3)
    codes, scales = quantized(padded, format, np.full(format.tiles(*padded.shape), scale))
    op = implementation("quantize_groups", provider)
    found = op(torch.from_numpy(x_ND), torch.tensor(counts), format, scale=torch.full((1, 1), float(scale)))
    assert_same_bits(found, codes, scales, "")


def ordered(codes: np.ndarray) -> np.ndarray:
    """Codes as integers that grow with the number; both zeros are 0."""
    magnitude = (codes & ~np.uint8(SIGN)).astype(int)
    return np.where(codes & SIGN, -magnitude, magnitude)


def gate_up(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> torch.Tensor:
    x = normal((shape[0], 2 * shape[1]), 14) * np.float32(scale)
    x[0, 0], x[0, 1], x[1, : shape[1]] = 300, -300, 0
    return torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("provider", "format"), cases("swiglu_quantize", [(1, 128), (1, 32), (0, 0), (1, 0)]))
def test_swiglu_against_fp64(provider, format, dtype):
    for size in (1e-3, 1.0, 30.0):
        x = gate_up(extents(format.tile), size, dtype)
        gate, up = np.split(x.double().numpy(), 2, axis=1)
        exact = gate / (1 + np.exp(-gate)) * up
        found = implementation("swiglu_quantize", provider)(x, format)
        moved = np.finfo(np.float32).eps * SWIGLU_ROUNDINGS * np.abs(exact) + SWIGLU_TINY * np.abs(up) * (gate != 0)
        # By magnitude: scales grow with it, and every code's number does.
        smaller, larger = np.maximum(np.abs(exact) - moved, 0), np.abs(exact) + moved
        scales = scales_of(found)
        assert (quantized(smaller.astype(np.float32), format)[1] <= scales).all()
        assert (quantized(larger.astype(np.float32), format)[1] >= scales).all()
        spread_scales = dequantized(QTensor(torch.ones(found.shape).to(found.data.dtype), found.scale, found.format))
        low, high = (
            ordered(nearest_codes(np.copysign(end, exact) / spread_scales, format.dtype)) for end in (smaller, larger)
        )
        codes = ordered(bits(found.data))
        assert (np.abs(codes) >= np.abs(low)).all()
        assert (np.abs(codes) <= np.abs(high)).all()
        assert (np.abs(high) - np.abs(low) <= 1).all(), "the bounds leave one code's freedom"
        assert (codes * np.sign(exact) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("provider", "format"), cases("swiglu_quantize", [(1, 128), (128, 128), (0, 0), (1, 32)]))
def test_swiglu_is_not_rounded_in_between(provider, format, dtype):
    """`quantize` of an FP32 SwiGLU, to the bit where that is torch's."""
    if provider not in TO_THE_BIT:
        pytest.skip("has an exponential of its own; test_swiglu_against_fp64 holds it")
    x = gate_up(extents(format.tile), 2.0, dtype)
    gate, up = x.float().chunk(2, dim=-1)
    codes, scales = quantized((torch.nn.functional.silu(gate) * up).numpy(), format)
    assert_same_bits(implementation("swiglu_quantize", provider)(x, format), codes, scales, "")


@pytest.mark.parametrize(("provider", "format"), cases("swiglu_quantize", [(1, 32)]))
def test_swiglu_that_overflows_shows(provider, format):
    """Factors that are finite while their product is none; and infinite ones, of which one is multiplied by zero."""
    x = torch.ones(3, 2 * 70)
    x[0, 3], x[0, 73] = 3e38, 2.0
    x[1, 40] = math.inf
    x[2, 69] = -math.inf
    found = implementation("swiglu_quantize", provider)(x, format)
    assert np.isnan(scales_of(found)).tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    given = implementation("swiglu_quantize", provider)(x, format, scale=torch.ones(1, 1))
    assert np.isnan(scales_of(given)).tolist() == np.isnan(scales_of(found)).tolist()
