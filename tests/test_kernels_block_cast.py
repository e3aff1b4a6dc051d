"""FP8 in blocks, bit for bit: against a loop over blocks, at edges, and both scale formats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.errors import UserError
from octofold.kernels.reference.block_cast import dequantize_blocks, quantize_blocks

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def weights(shape: tuple[int, ...], seed: int, exponent: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0**exponent


def nearest_e4m3(value: float) -> float:
    """Round to nearest, ties to even, on the grid of 4-bit mantissas with exponents from -6 on."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


@given(
    shape=shapes, block=st.integers(1, 16), seed=st.integers(0, 99), exponent=st.integers(-30, 30), power=st.booleans()
)
def test_against_a_loop(shape, block, seed, exponent, power):
    w = weights(shape, seed, exponent)
    data, scale = quantize_blocks(w, block=block, power_of_two=power)
    assert data.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-shape[0] // block), -(-shape[1] // block))
    back = dequantize_blocks(data, scale, block=block)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            rows, columns = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
            expected = torch.tensor(max(w[rows, columns].abs().max().item(), 1e-4)) / 448
            if power:
                expected = torch.tensor(2.0 ** math.ceil(math.log2(expected.item())))
            assert scale[r, c] == expected
            scaled = w[rows, columns] / expected
            assert data[rows, columns].float().tolist() == [[nearest_e4m3(x) for x in row] for row in scaled.tolist()]
            assert torch.equal(back[rows, columns], data[rows, columns].float() * expected)


@given(exponent=st.integers(-14, 20))
def test_a_scale_that_is_a_power_of_two_stays(exponent):
    _, scale = quantize_blocks(torch.full((2, 2), 448 * 2.0**exponent), block=2, power_of_two=True)
    assert scale.item() == max(2.0**exponent, 2.0**-22)


@given(shape=shapes, seed=st.integers(0, 99))
def test_power_of_two_scales_survive_another_round(shape, seed):
    first = dequantize_blocks(*quantize_blocks(weights(shape, seed), block=8, power_of_two=True), block=8)
    again = dequantize_blocks(*quantize_blocks(first, block=8, power_of_two=True), block=8)
    assert torch.equal(first, again)


def test_leading_dims_and_e8m0_scales():
    w = weights((3, 20, 12), 0)
    data, scale = quantize_blocks(w, block=8, power_of_two=True)
    for expert in range(3):
        alone = quantize_blocks(w[expert], block=8, power_of_two=True)
        assert torch.equal(data[expert].float(), alone[0].float())
        assert torch.equal(scale[expert], alone[1])
    e8m0 = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(dequantize_blocks(data, e8m0, block=8), dequantize_blocks(data, scale, block=8))


def test_zeros_and_bad_numbers():
    data, scale = quantize_blocks(torch.zeros(3, 5), block=4)
    assert not data.float().any()
    assert (scale == torch.tensor(1e-4) / 448).all()
    for bad in (math.nan, math.inf):
        w = torch.zeros(3, 5)
        w[2, 4] = bad
        with pytest.raises(UserError, match="not finite"):
            quantize_blocks(w, block=4)
