"""Every provider of `quantize` and `dequantize`, bit for bit against tests/fp8_formulas.py, on adversarial input."""

import math

import numpy as np
import pytest
import torch
from fp8_cases import cases, extents, implementation, normal, serving, with_some
from fp8_formulas import (
    SIGN,
    assert_same_bits,
    bits,
    decoded,
    dequantized,
    magnitudes,
    midpoints,
    nearest_codes,
    quantized,
    value_of,
)
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels.qtensor import E4M3, E5M2, LARGEST, PUBLISHED_LEAST_AMAX, Format, QTensor
from octofold.kernels.reference.quantize import quantize as quantize_reference

pytestmark = pytest.mark.usefixtures("poisoned")

TILES = [(1, 128), (128, 1), (128, 128), (0, 0), (1, 0), (1, 32), (32, 1), (32, 32), (1, 16), (16, 16)]
FP32_LARGEST = float(np.finfo(np.float32).max)


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """FP32 numbers, the next below and above each, and the negatives of all."""
    x = x.astype(np.float32)
    up, down = (np.nextafter(x, np.float32(toward)) for toward in (np.inf, -np.inf))
    return np.concatenate([x, up, down, -x, -up, -down])


def drawn(shape: tuple[int, int], numbers: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(numbers.astype(np.float32), shape)


def on_the_grid(shape: tuple[int, int], dtype: torch.dtype, shift: int) -> np.ndarray:
    """Codes, midpoints and their neighbours, times 2^shift, with the format's largest number in most tiles."""
    grid = with_neighbours(np.concatenate([magnitudes(dtype), midpoints(dtype)]))
    largest = magnitudes(dtype)[-1]
    x = drawn(shape, grid[np.abs(grid) <= largest], seed=shift + 200)
    x[::7, ::3] = largest
    return (x * np.float64(2.0) ** shift).astype(np.float32)


def adversarial(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Matrices that a quantiser may get wrong, by what is hard about them."""
    largest = magnitudes(dtype)[-1]
    spread = normal(shape, 3) * np.float32(2.0) ** np.random.default_rng(3).integers(-60, 60, shape)
    return {
        "normal": normal(shape, 0),
        "of every size": spread.astype(np.float32),
        "zeros": np.zeros(shape, np.float32),
        "zeros of both signs": drawn(shape, np.array([0.0, -0.0])),
        "zeros and a number": with_some(np.zeros(shape, np.float32), [1.0]),
        "FP32 subnormals": drawn(shape, with_neighbours(np.array([2.0**-149, 3e-42, 2.0**-127]))),
        "a scale at its least": normal(shape, 4) * np.float32(2.0**-120),
        "outliers": with_some(normal(shape, 1) * np.float32(1e-3), [1e30, -3e4]),
        "codes and midpoints": on_the_grid(shape, dtype, 0),
        "codes and midpoints, tiny": on_the_grid(shape, dtype, -100),
        "codes and midpoints, huge": on_the_grid(shape, dtype, 90),
        "the largest and its neighbours": drawn(shape, with_neighbours(np.array([largest, largest / 2, 464.0]))),
        "FP32's largest": with_some(normal(shape, 2), [FP32_LARGEST, -FP32_LARGEST]),
        "infinity": with_some(normal(shape, 5), [math.inf]),
        "minus infinity": with_some(np.zeros(shape, np.float32), [-math.inf]),
        "NaN": with_some(normal(shape, 6), [math.nan]),
        "NaN beside infinity": with_some(normal(shape, 7), [math.nan, math.inf, -math.inf]),
    }


@pytest.mark.parametrize(("provider", "format"), cases("quantize", TILES))
def test_adversarial(provider, format):
    """As it is, transposed in memory, and with the transpose asked for."""
    quantize = implementation("quantize", provider)
    for what, x_RC in adversarial(extents(format.tile), format.dtype).items():
        codes, scales = quantized(x_RC, format)
        x = torch.from_numpy(x_RC)
        assert_same_bits(quantize(x, format), codes, scales, what)
        assert_same_bits(quantize(x.t().contiguous().t(), format), codes, scales, f"{what}, strided")
        turned = quantize(x, format, transpose=True)
        assert turned.format == format.transposed
        assert_same_bits(turned, codes.T, scales.T, f"{what}, transposed")


WHOLE_ROWS = cases("quantize", [(1, 0)])


@pytest.mark.parametrize(("provider", "format"), WHOLE_ROWS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**40])
def test_every_bf16_number_at_a_given_scale(provider, format, scale):
    """Each is rounded as the definition has it; those beyond the largest saturate, those below half the least are 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()][None]
    with np.errstate(over="ignore"):
        codes = nearest_codes(x.float().numpy() / np.float32(scale), format.dtype)
    found = implementation("quantize", provider)(x, format, scale=torch.full((1, 1), scale))
    assert_same_bits(found, codes, np.full((1, 1), scale, np.float32), "cast")
    largest = int((bits(found.data) & ~np.uint8(SIGN)).max())
    assert value_of(largest, format.dtype) == LARGEST[format.dtype]


@pytest.mark.parametrize(("provider", "format"), WHOLE_ROWS)
def test_every_midpoint_in_fp32(provider, format):
    """Ties go to the even code, and a tie is a tie to the last bit: its FP32 neighbours go to their own sides."""
    x_RC = with_neighbours(midpoints(format.dtype))[None]
    codes, scales = quantized(x_RC, format, np.ones((1, 1), np.float32))
    found = implementation("quantize", provider)(torch.from_numpy(x_RC), format, scale=torch.ones(1, 1))
    assert_same_bits(found, codes, scales, "midpoints")
    ties = len(midpoints(format.dtype))
    assert not (bits(found.data)[0, :ties] % 2).any()


@pytest.mark.parametrize(("provider", "format"), cases("quantize", [(1, 128), (128, 128), (0, 0), (1, 32)]))
@pytest.mark.parametrize("shared", [True, False], ids=["one scale", "a scale a tile"])
def test_given_scales_saturate(provider, format, shared):
    """A scale far too small for some elements; NaN and infinities still show, whatever scale they are given."""
    shape = extents(format.tile)
    x_RC = with_some(normal(shape, 8), [1e5, -1e6, math.inf, math.nan])
    r, c = format.tiles(*shape)
    exponents = np.zeros((1, 1)) if shared else np.random.default_rng(9).integers(-12, 3, (r, c))
    given_rc = np.broadcast_to(np.ldexp(np.float32(1), exponents.astype(int)), (r, c)).astype(np.float32)
    if format.scale == "float":
        given_rc = given_rc * np.float32(1.37)
    codes, scales = quantized(x_RC, format, given_rc)
    given = torch.from_numpy(given_rc[:1, :1] if shared else given_rc)
    quantize = implementation("quantize", provider)
    assert_same_bits(quantize(torch.from_numpy(x_RC), format, scale=given), codes, scales, "given")
    turned = quantize(torch.from_numpy(x_RC), format, transpose=True, scale=given)
    assert_same_bits(turned, codes.T, scales.T, "given, transposed")


@pytest.mark.parametrize("least_amax", [PUBLISHED_LEAST_AMAX, 1.0])
@pytest.mark.parametrize(("provider", "format"), cases("quantize", [(1, 32), (32, 32)]))
def test_least_amax(provider, format, least_amax):
    bounded = Format(format.tile, format.scale, format.dtype, least_amax)
    x_RC = normal(extents(format.tile), 10)
    x_RC[:, :32] *= np.float32(1e-7)
    x_RC[:, 32:64] = 0
    codes, scales = quantized(x_RC, bounded)
    assert_same_bits(implementation("quantize", provider)(torch.from_numpy(x_RC), bounded), codes, scales, "small")
    assert scales.min() >= least_amax / format.largest


@pytest.mark.parametrize(("provider", "format"), cases("quantize", [(1, 128), (128, 128), (0, 0), (1, 0), (16, 16)]))
@pytest.mark.parametrize("shape", [(0, 0), (0, 130), (130, 0), (1, 1)])
def test_empty_and_tiny(provider, format, shape):
    """No tile has no scale; one that is the whole extent of an empty dim has one."""
    x_RC = normal(shape, 0)
    found = implementation("quantize", provider)(torch.from_numpy(x_RC), format)
    assert_same_bits(found, *quantized(x_RC, format), "")


@pytest.mark.parametrize(("provider", "format"), cases("quantize", [(1, 128), (128, 128), (0, 0), (1, 0), (1, 32)]))
def test_stacks(provider, format):
    """Each matrix of a stack as if alone."""
    x_ERC = normal((3, *extents(format.tile)), 11) * np.array([1e-3, 1, 1e3], np.float32)[:, None, None]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.from_numpy(x_ERC).to(dtype)
        found = implementation("quantize", provider)(x, format)
        turned = implementation("quantize", provider)(x, format, transpose=True)
        for index, matrix in enumerate(x.float().numpy()):
            codes, scales = quantized(matrix, format)
            alone = QTensor(found.data[index], found.scale[index], format)
            assert_same_bits(alone, codes, scales, f"matrix {index}, {dtype}")
            alone = QTensor(turned.data[index], turned.scale[index], turned.format)
            assert_same_bits(alone, codes.T, scales.T, f"matrix {index}, {dtype}, transposed")


@pytest.mark.parametrize("provider", serving("quantize", Format((1, 128))))
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
    tile=st.sampled_from([*TILES, (4, 8), (1, 1)]),
    scale=st.sampled_from(["ue8m0", "float"]),
    dtype=st.sampled_from([E4M3, E5M2]),
    least_amax=st.sampled_from([0.0, PUBLISHED_LEAST_AMAX]),
    of=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    tame=st.booleans(),
    strided=st.booleans(),
    transpose=st.booleans(),
)
def test_any_bits(provider, rows, columns, tile, scale, dtype, least_amax, of, seed, tame, strided, transpose):
    """Matrices of arbitrary bits, NaN and infinities among them; or tame ones, where more than the largest is seen."""
    format = Format(tile, scale, dtype, least_amax)
    x = any_bits((rows, columns), of, seed)
    if tame:
        mantissa, exponent = x.float().frexp()
        x = torch.where(x.isfinite(), mantissa.ldexp(exponent % 24), 0).to(of)
    codes, scales = quantized(x.float().numpy(), format)
    seen = x.t().contiguous().t() if strided else x
    found = implementation("quantize", provider)(seen, format, transpose=transpose)
    assert_same_bits(found, codes.T if transpose else codes, scales.T if transpose else scales, "")


def any_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).bytes(shape[0] * shape[1] * dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def test_codes_are_torchs_numbers():
    """The formula's table is what hardware and torch understand by these codes."""
    every = np.arange(256, dtype=np.uint8)
    for dtype in (E4M3, E5M2):
        numbers = torch.from_numpy(every).view(dtype).double().numpy()
        finite = np.isfinite(numbers)
        assert np.array_equal(decoded(every, dtype)[finite], numbers[finite])
        assert np.isnan(decoded(every, dtype)[~finite]).all()
        assert magnitudes(dtype)[-1] == LARGEST[dtype]


@pytest.mark.parametrize(("provider", "format"), cases("dequantize", TILES))
def test_dequantize(provider, format):
    """Exact in FP32 and FP64, and in BF16 with scales of powers of two; rounded once or twice with others."""
    shape = extents(format.tile)
    x = torch.from_numpy(normal(shape, 15) * np.float32(2) ** (np.arange(shape[1]) % 40 - 20).astype(np.float32))
    q = quantize_reference(x, format)
    exact = dequantized(q)
    dequantize = implementation("dequantize", provider)
    assert q.dequantize(torch.float64).dtype == torch.float64
    assert np.array_equal(q.dequantize(torch.float64).numpy(), exact)
    for turned in (False, True):
        tensor, wanted = (q.t(), exact.T) if turned else (q, exact)
        assert np.array_equal(dequantize(tensor, torch.float32).numpy(), wanted.astype(np.float32))
        found = dequantize(tensor, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        rounded = torch.from_numpy(np.ascontiguousarray(wanted)).float().bfloat16()
        assert torch.equal(found, rounded)


@pytest.mark.parametrize(("provider", "format"), cases("dequantize", [(1, 0)]))
def test_dequantize_every_code_at_every_scale(provider, format):
    """Down to where BF16 rounds to its own subnormal numbers, once."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[np.isfinite(decoded(codes, format.dtype))]
    exponents = torch.arange(-126, 111)
    data = torch.from_numpy(np.tile(codes, (len(exponents), 1))).view(format.dtype)
    scale = torch.ones(len(exponents), 1).ldexp(exponents[:, None]) * (1 if format.scale == "ue8m0" else 1.5)
    q = QTensor(data, scale.to(format.scale_dtype), format)
    exact = torch.from_numpy(dequantized(q)).float()
    dequantize = implementation("dequantize", provider)
    assert torch.equal(dequantize(q, torch.float32), exact)
    assert torch.equal(dequantize(q, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("provider", serving("dequantize", Format((1, 32))))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_cannot_hide(provider, bad):
    """The tile is NaN as a whole, also after products would have lost the element; the tiles around it are intact."""
    format = Format((1, 32))
    x = torch.zeros(3, 96)
    x[:, ::7] = 3.0
    x[1, 40] = bad
    for scale in (None, torch.ones(1, 1)):
        q = quantize_reference(x, format, scale=scale)
        for dtype in (torch.bfloat16, torch.float32):
            back = implementation("dequantize", provider)(q, dtype)
            assert back[1, 32:64].isnan().all()
            assert back.isnan().sum() == 32
            assert torch.equal(back[0].float(), x[0])


def test_transposing_is_a_view():
    q = quantize_reference(torch.from_numpy(normal((40, 70), 16)), Format((1, 32)))
    turned = q.t()
    assert turned.shape == (70, 40)
    assert turned.format.tile == (32, 1)
    assert turned.data.data_ptr() == q.data.data_ptr()
    assert torch.equal(turned.dequantize(), q.dequantize().t())
    assert turned.t().format == q.format
    assert q.size_bytes == 40 * 70 + 40 * 3
