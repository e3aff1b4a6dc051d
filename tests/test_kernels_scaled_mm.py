"""Every provider of products of quantised matrices against FP64 products of the dequantised operands.

How close: the relative Frobenius error is below `BOUNDS`. Operands are dequantised by tests/fp8_formulas.py, so neither
torch's casts nor the specification decide what is right; their tiles differ in size by up to 64 times, so that no
scale can be taken for its neighbour's. Memory is poisoned with NaN.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fp8_cases import implementation, serving, why_not
from fp8_formulas import dequantized, magnitudes
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor, spread
from octofold.kernels.reference.limited_accumulator import KEPT_BITS, TERMS_AT_ONCE, limited_mm
from octofold.kernels.reference.quantize import quantize, quantize_groups
from octofold.kernels.registry import PROVIDERS

pytestmark = pytest.mark.usefixtures("poisoned")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}
"""FP32 sums of a few hundred terms; one rounding to BF16, on average over many numbers."""
MANY = 100
"""Numbers of a result, below which the worst of BF16's roundings may be all there is."""
WORST = 2.0**-8
ROUNDED_OPERANDS = ["cpu"]
"""Providers that round both operands of BF16 results to BF16 as well where scales are no powers of two."""
PAIRS = {
    "blocks": (Format((1, 128)), Format((128, 128))),
    "blocks of 32": (Format((1, 32)), Format((32, 32))),
    "blocks of 16": (Format((1, 16)), Format((16, 16))),
    "blocks, FP32 scales": (Format((1, 32), "float"), Format((32, 32), "float")),
    "blocks, E5M2": (Format((1, 32), dtype=E5M2), Format((32, 32))),
    "tiles": (Format((1, 32)), Format((1, 32))),
    "tiles, E5M2 and FP32 scales": (Format((1, 16), "float", E5M2), Format((1, 16), "float")),
    "rows": (Format((1, 0)), Format((1, 0))),
    "one scale": (Format((0, 0), "float"), Format((0, 0), "float")),
    "one scale, E5M2": (Format((0, 0), dtype=E5M2), Format((0, 0))),
}
"""Formats of a and b."""
INNER = {name: pair for name, pair in PAIRS.items() if pair[1].tile[0] in (0, 1)}
"""What weight gradients are formed of: tiles along the sum in both."""
seeds = st.integers(0, 2**31)
out_dtypes = st.sampled_from(list(BOUNDS))


def pairs_of(op: str, pairs: dict[str, tuple[Format, Format]]) -> list[Any]:
    """Every provider of `op` with every pair of formats it takes."""
    return [
        pytest.param(provider, pair, id=f"{provider}-{name}")
        for name, pair in pairs.items()
        for provider in serving(op, *pair)
    ]


def matrix(shape: tuple[int, ...], format: Format, seed: int) -> torch.Tensor:
    """FP32, normal, with tiles of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    sizes = torch.randint(-3, 4, (*shape[:-2], *format.tiles(*shape[-2:])), generator=generator)
    return x * spread(torch.ones(sizes.shape).ldexp(sizes), format.tile, x.shape)


def operand(shape: tuple[int, ...], format: Format, seed: int, *, turned: bool = False) -> QTensor:
    """A quantised matrix or stack; `turned`: as the transpose of one that lies in memory the other way round."""
    if turned:
        return operand((*shape[:-2], shape[-1], shape[-2]), format.transposed, seed).t()
    return quantize(matrix(shape, format, seed), format)


def assert_close(found: torch.Tensor, exact: np.ndarray, dtype: torch.dtype, *, roundings: int = 1) -> None:
    """`roundings`: to BF16, independent of each other."""
    assert found.shape == exact.shape
    assert found.dtype == dtype
    assert found.isfinite().all(), "memory that was never written"
    most = BOUNDS[dtype]
    if dtype == torch.bfloat16:
        most = most * math.sqrt(roundings) if exact.size >= MANY else WORST * roundings
    error, size = np.linalg.norm((found.double().numpy() - exact).ravel()), np.linalg.norm(exact.ravel())
    if dtype == torch.bfloat16:
        # A few large numbers may outweigh the rest: nothing is nearer than the exact result, rounded.
        nearest = torch.from_numpy(exact).to(dtype).double().numpy()
        most = max(most, 1.1 * np.linalg.norm((nearest - exact).ravel()) / max(size, 1e-300))
    assert error <= most * size, f"{error:.1e} off, of size {size:.1e}"


def roundings(provider: str, pair: tuple[Format, Format]) -> int:
    """To BF16, of a BF16 result."""
    inexact = any(format.scale == "float" for format in pair)
    return 3 if inexact and provider in ROUNDED_OPERANDS else 1


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_mm", PAIRS))
@given(
    m=st.integers(0, 50),
    n=st.integers(0, 50),
    k=st.integers(0, 150),
    out_dtype=out_dtypes,
    seed=seeds,
    turned=st.booleans(),
)
def test_scaled_mm(provider, pair, m, n, k, out_dtype, seed, turned):
    a, b = operand((m, k), pair[0], seed), operand((n, k), pair[1], seed + 1, turned=turned)
    found = implementation("scaled_mm", provider)(a, b, out_dtype=out_dtype)
    assert_close(found, dequantized(a) @ dequantized(b).T, out_dtype, roundings=roundings(provider, pair))


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_mm", PAIRS))
def test_scaled_mm_of_whole_and_partial_tiles(provider, pair):
    """128 and its neighbours in every dim, and results in BF16 unless asked otherwise."""
    for m, n, k in [(128, 128, 128), (129, 127, 257), (1, 300, 128), (300, 1, 384)]:
        a, b = operand((m, k), pair[0], k), operand((n, k), pair[1], n)
        exact = dequantized(a) @ dequantized(b).T
        found = implementation("scaled_mm", provider)(a, b)
        assert_close(found, exact, torch.bfloat16, roundings=roundings(provider, pair))
        found = implementation("scaled_mm", provider)(a, b, out_dtype=torch.float32)
        assert_close(found, exact, torch.float32)


def counts_of(groups: int) -> st.SearchStrategy[list[int]]:
    """Rows of each group: anything with empty ones among them, one row each, all in one, none at all."""
    arbitrary = st.lists(st.integers(0, 40), min_size=groups, max_size=groups)
    one_takes_all = st.tuples(st.integers(0, groups - 1), st.integers(1, 200)).map(
        lambda taker: [taker[1] if group == taker[0] else 0 for group in range(groups)]
    )
    return st.one_of(arbitrary, one_takes_all, st.just([1] * groups), st.just([0] * groups))


def grouped_rows(a: QTensor, b: QTensor, counts: list[int]) -> np.ndarray:
    """FP64 [N, F]: the rows of each group times its transposed matrix."""
    a_NK, b_EFK = dequantized(a), dequantized(b)
    ends = np.cumsum(counts)
    parts = [a_NK[end - count : end] @ w.T for end, count, w in zip(ends, counts, b_EFK, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_grouped_mm", PAIRS))
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    f=st.integers(1, 40),
    k=st.integers(1, 70),
    out_dtype=out_dtypes,
    seed=seeds,
    turned=st.booleans(),
)
def test_scaled_grouped_mm(provider, pair, data, groups, f, k, out_dtype, seed, turned):
    counts = data.draw(counts_of(groups))
    a = operand((sum(counts), k), pair[0], seed)
    b = operand((groups, f, k), pair[1], seed + 1, turned=turned)
    found = implementation("scaled_grouped_mm", provider)(a, b, torch.tensor(counts), out_dtype=out_dtype)
    assert_close(found, grouped_rows(a, b, counts), out_dtype, roundings=roundings(provider, pair))


def grouped_inner(a_ND: torch.Tensor, format: Format, counts: list[int]) -> tuple[QTensor, list[np.ndarray]]:
    """An operand of the product over rows, and each group's part of it in FP64, without what fills it up."""
    q = quantize_groups(a_ND, torch.tensor(counts), format)
    unit = format.tile[1] or 128
    numbers, tiles = dequantized(q), np.array([math.ceil(count / unit) for count in counts])
    starts = (np.cumsum(tiles) - tiles) * unit
    return q, [numbers[:, start : start + count] for start, count in zip(starts, counts, strict=True)]


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_grouped_inner_mm", INNER))
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    f=st.integers(1, 40),
    d=st.integers(1, 40),
    out_dtype=out_dtypes,
    seed=seeds,
)
def test_scaled_grouped_inner_mm(provider, pair, data, groups, f, d, out_dtype, seed):
    """Empty groups have gradients of zero, though nothing is written for them elsewhere."""
    counts = data.draw(counts_of(groups))
    sources = [
        matrix((sum(counts), width), format.transposed, seed + width)
        for width, format in zip((f, d), pair, strict=True)
    ]
    (a, parts_a), (b, parts_b) = (grouped_inner(x, format, counts) for x, format in zip(sources, pair, strict=True))
    exact = np.stack([left @ right.T for left, right in zip(parts_a, parts_b, strict=True)])
    found = implementation("scaled_grouped_inner_mm", provider)(a, b, torch.tensor(counts), out_dtype=out_dtype)
    for group, count in enumerate(counts):
        assert count or not found[group].any()
    assert_close(found, exact, out_dtype, roundings=roundings(provider, pair))


EXACT = {name: pair for name, pair in INNER.items() if pair[0].scale == pair[1].scale == "ue8m0"}


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_grouped_inner_mm", EXACT))
@pytest.mark.parametrize("cancelled_after", [64, 128])
def test_sums_over_rows_are_rounded_once(provider, pair, cancelled_after):
    """1 remains of 257 - 256, however the rows are cut up; BF16 has no 257."""
    x = torch.full((cancelled_after + 1, 2), 256 / cancelled_after)
    x[0] += 1
    x[-1] = -256
    counts = torch.tensor([len(x)])
    operands = [quantize_groups(x, counts, pair[0]), quantize_groups(torch.ones(len(x), 3), counts, pair[1])]
    found = implementation("scaled_grouped_inner_mm", provider)(*operands, counts)
    assert torch.equal(found, torch.ones(1, 2, 3, dtype=torch.bfloat16))


BLOCKS = {"blocks": (Format((1, 32)), Format((32, 32)))}
TILED = {"tiles": (Format((1, 32)), Format((1, 32)))}


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_mm", BLOCKS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(provider, pair, bad):
    x, w = torch.ones(5, 70), torch.ones(40, 70)
    x[2, 40] = bad
    w[35, 69] = bad
    a, b = quantize(x, pair[0]), quantize(w, pair[1])
    for dtype in BOUNDS:
        found = implementation("scaled_mm", provider)(a, b, out_dtype=dtype).isnan()
        wanted = torch.zeros(5, 40, dtype=torch.bool)
        wanted[2] = wanted[:, 32:] = True
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_grouped_mm", BLOCKS))
def test_what_is_not_finite_shows_in_its_group_alone(provider, pair):
    counts = torch.tensor([3, 0, 2])
    x, w_EFK = torch.ones(5, 70), torch.ones(3, 40, 70)
    w_EFK[2, 0, 0] = math.inf
    a, b = quantize(x, pair[0]), quantize(w_EFK, pair[1])
    found = implementation("scaled_grouped_mm", provider)(a, b, counts).isnan()
    assert found[3:, :32].all()
    assert found.sum() == 2 * 32


@pytest.mark.parametrize(("provider", "pair"), pairs_of("scaled_grouped_inner_mm", TILED))
def test_what_is_not_finite_shows_in_its_groups_gradient_alone(provider, pair):
    counts = torch.tensor([33, 0, 40])
    x = torch.ones(73, 6)
    x[72, 4] = math.nan
    a, b = quantize_groups(x, counts, pair[0]), quantize_groups(torch.ones(73, 3), counts, pair[1])
    found = implementation("scaled_grouped_inner_mm", provider)(a, b, counts).isnan()
    assert found[2, 4].all()
    assert found.sum() == 3


def grown(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Positive numbers between 0 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() / exact - 1).mean())


def test_limited_sums_of_small_integers_are_exact():
    """14 bits hold every product and every sum."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (7, 320), generator=generator).float() for _ in range(2))
    q_a, q_b = (quantize(x, Format((1, 0)), scale=torch.ones(1, 1)) for x in (a, b))
    for promote_every in (0, 32, 128):
        assert torch.equal(limited_mm(q_a, q_b, promote_every=promote_every), a @ b.T)


def test_limited_sums_of_4096_positive_terms_lose_percents():
    """All are cut off downwards, so this is the worst case: 6.6%, where DeepSeek-V3 measured 2%; 0.05% if promoted."""
    a, b = (quantize(grown((8, 4096), seed), Format((1, 0))) for seed in (0, 1))
    exact = dequantized(a) @ dequantized(b).T
    never, promoted = (relative_error(limited_mm(a, b, promote_every=every), exact) for every in (0, 128))
    assert 0.02 < never < 0.1
    assert promoted < 1e-3


def cut(value: Fraction, quantum: Fraction) -> Fraction:
    return int(value / quantum) * quantum


def limited_dot(a: np.ndarray, b: np.ndarray) -> Fraction:
    """One dot product in exact numbers, cut as the accumulator cuts."""

    def quantum(x: Fraction) -> Fraction:
        return Fraction(2) ** (math.frexp(float(x))[1] - KEPT_BITS)

    inner = Fraction(0)
    for start in range(0, len(a), TERMS_AT_ONCE):
        several = slice(start, start + TERMS_AT_ONCE)
        terms = [Fraction(x) * Fraction(y) for x, y in zip(a[several], b[several], strict=True)] + [inner]
        largest = max(map(abs, terms))
        total = sum((cut(term, quantum(largest)) for term in terms), Fraction(0))
        inner = cut(total, quantum(total))
    return inner


@given(k=st.integers(1, 100), seed=seeds)
def test_limited_sums_term_by_term(k, seed):
    """Against exact fractions, with numbers of every size that E4M3 has."""
    numbers = np.random.default_rng(seed).choice(magnitudes(E4M3), (2, k)) * np.random.default_rng(seed).choice([-1, 1])
    a, b = (quantize(torch.tensor(x[None]).float(), Format((1, 0)), scale=torch.ones(1, 1)) for x in numbers)
    assert limited_mm(a, b, promote_every=0).item() == float(limited_dot(*numbers))


@pytest.mark.parametrize("provider", PROVIDERS["scaled_mm"])
def test_sums_are_limited_where_that_is_asked_for(provider):
    """A provider that cannot says so; one that can errs as the model does, dense and grouped alike."""
    reason = why_not("scaled_mm", provider, *BLOCKS["blocks"], accumulation="hopper")
    if reason is not None:
        assert provider != "reference"
        assert "cpu" in reason or "hopper" in reason
        return
    options = {"out_dtype": torch.float32, "accumulation": "hopper"}
    formats, counts = (Format((1, 128)), Format((128, 128))), torch.tensor([4, 0, 3])
    x, w = grown((7, 256), 2), grown((3 * 128, 256), 3).view(3, 128, 256)
    a, b = quantize(x, formats[0]), quantize(w, formats[1])
    found = implementation("scaled_grouped_mm", provider)(a, b, counts, **options)
    error = relative_error(found, grouped_rows(a, b, counts.tolist()))
    assert 1e-5 < error < 1e-2
    dense = implementation("scaled_mm", provider)(a, QTensor(b.data[2], b.scale[2], b.format), **options)
    assert torch.equal(found[4:], dense[4:])
    q_a, q_b = (quantize_groups(grown((300, 5), seed), torch.tensor([300]), formats[0]) for seed in (4, 5))
    inner = implementation("scaled_grouped_inner_mm", provider)(q_a, q_b, torch.tensor([300]), **options)
    assert 1e-5 < relative_error(inner[0], dequantized(q_a) @ dequantized(q_b).T) < 1e-2
