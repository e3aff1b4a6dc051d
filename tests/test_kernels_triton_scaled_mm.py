"""Triton's scaled products against the reference: in Triton's interpreter, through its compiler, and on a GPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_processes import SM_90, compiled, interpreted

from octofold.kernels import triton_scaled_mm
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor
from octofold.kernels.reference import quantize as reference_quantize
from octofold.kernels.reference import scaled_mm as reference
from octofold.kernels.registry import Workload

OPS = ["scaled_mm", "scaled_grouped_mm", "scaled_grouped_inner_mm"]
MOST = 1e-5
ONE_BF16 = 2**-7
"""Of the interpreter's BF16, which cuts off where a GPU rounds."""
TILES = [
    ((1, 128), (128, 128)),
    ((1, 128), (1, 128)),
    ((128, 128), (1, 128)),
    ((1, 16), (16, 16)),
    ((1, 48), (48, 48)),
    ((1, 256), (256, 256)),
    ((1, 32), (1, 32)),
    ((1, 0), (1, 0)),
    ((0, 0), (0, 0)),
    ((1, 0), (0, 0)),
]
ROW_TILES = [pair for pair in TILES if pair[0][0] <= 1]
INNER_TILES = [pair for pair in TILES if pair[0][0] <= 1 and pair[1][0] <= 1]

terms = st.one_of(st.integers(1, 300), st.integers(1, 20).map(lambda n: 16 * n))
"""TMA takes multiples of 16."""
sizes = st.one_of(st.integers(1, 200), st.sampled_from([64, 128]))
seeds = st.integers(0, 2**31)
scales = st.sampled_from(["ue8m0", "float"])
dtypes = st.sampled_from([E4M3, E5M2])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(x: torch.Tensor, format: Format, *, turned: bool = False) -> QTensor:
    """Contiguous, or the view of a contiguous transpose."""
    if turned:
        return reference_quantize.quantize(x.mT.contiguous(), format.transposed).t()
    return reference_quantize.quantize(x, format)


def counts_of(groups: int) -> st.SearchStrategy[list[int]]:
    arbitrary = st.lists(st.one_of(st.just(0), st.integers(0, 90)), min_size=groups, max_size=groups)
    one_takes_all = st.tuples(st.integers(0, groups - 1), st.integers(1, 200)).map(
        lambda taker: [taker[1] if group == taker[0] else 0 for group in range(groups)]
    )
    return st.one_of(arbitrary, one_takes_all, st.just([0] * groups))


def in_bytes(x: Any) -> Any:
    """Operands as another process can receive them: torch pickles no eight-bit floats."""
    if not isinstance(x, QTensor):
        return x
    scale = x.scale if x.scale.dtype == torch.float32 else x.scale.view(torch.uint8)
    return x.data.view(torch.uint8), scale, x.format


def from_bytes(x: Any) -> Any:
    """The operand."""
    if isinstance(x, torch.Tensor):
        return x
    data, scale, format = x
    return QTensor(data.view(format.dtype), scale.view(format.scale_dtype), format)


def product(op: str, operands: list[Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Where kernels are interpreted."""
    found: torch.Tensor = getattr(triton_scaled_mm, op)(*map(from_bytes, operands), out_dtype=out_dtype)
    return found


def triton(op: str, *operands: Any, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What the op returns in Triton's interpreter."""
    found: torch.Tensor = interpreted(f"{__name__}:product", op, [in_bytes(x) for x in operands], out_dtype)
    return found


def assert_as_reference(op: str, *operands: QTensor | torch.Tensor) -> None:
    exact = getattr(reference, op)(*operands, out_dtype=torch.float32)
    found = triton(op, *operands, out_dtype=torch.float32)
    assert (found.shape, found.dtype) == (exact.shape, torch.float32)
    assert float((found - exact).norm()) <= MOST * float(exact.norm())
    rounded = triton(op, *operands)
    assert (rounded.shape, rounded.dtype) == (exact.shape, torch.bfloat16)
    assert bool(((rounded - found).abs() <= ONE_BF16 * found.abs()).all())


@settings(max_examples=20)
@given(
    rows=sizes,
    columns=sizes,
    terms=terms,
    tiles=st.sampled_from(TILES),
    scale=scales,
    dtype=dtypes,
    turned=st.booleans(),
    seed=seeds,
)
def test_scaled_mm(rows, columns, terms, tiles, scale, dtype, turned, seed):
    turned = turned and tiles[1] != (1, 0)
    a = quantized(normal(seed, rows, terms), Format(tiles[0], scale, dtype))
    b = quantized(normal(seed + 1, columns, terms), Format(tiles[1], scale), turned=turned)
    assert_as_reference("scaled_mm", a, b)


@settings(max_examples=20)
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    columns=sizes,
    terms=terms,
    tiles=st.sampled_from(ROW_TILES),
    scale=scales,
    dtype=dtypes,
    turned=st.booleans(),
    seed=seeds,
)
def test_scaled_grouped_mm(data, groups, columns, terms, tiles, scale, dtype, turned, seed):
    counts = data.draw(counts_of(groups))
    turned = turned and tiles[1] != (1, 0)
    a = quantized(normal(seed, sum(counts), terms), Format(tiles[0], scale, dtype))
    b = quantized(normal(seed + 1, groups, columns, terms), Format(tiles[1], scale), turned=turned)
    assert_as_reference("scaled_grouped_mm", a, b, torch.tensor(counts))


@settings(max_examples=20)
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    rows=sizes,
    columns=sizes,
    tiles=st.sampled_from(INNER_TILES),
    scale=scales,
    dtype=dtypes,
    contiguous=st.booleans(),
    seed=seeds,
)
def test_scaled_grouped_inner_mm(data, groups, rows, columns, tiles, scale, dtype, contiguous, seed):
    counts = torch.tensor(data.draw(counts_of(groups)))
    x_NF, y_ND = (normal(seed + index, int(counts.sum()), width) for index, width in enumerate((rows, columns)))
    a, b = (
        reference_quantize.quantize_groups(x, counts, Format(tile, scale, to))
        for x, tile, to in ((x_NF, tiles[0], dtype), (y_ND, tiles[1], E4M3))
    )
    if contiguous:
        a, b = (QTensor(x.data.contiguous(), x.scale.contiguous(), x.format) for x in (a, b))
    assert_as_reference("scaled_grouped_inner_mm", a, b, counts)


@pytest.mark.parametrize("tile", [(1, 128), (0, 0)])
def test_more_blocks_than_are_computed_side_by_side(tile):
    a, b = quantized(normal(0, 700, 144), Format(tile)), quantized(normal(1, 300, 144), Format(tile))
    assert_as_reference("scaled_mm", a, b)
    weights = quantized(normal(2, 3, 300, 144), Format(tile))
    assert_as_reference("scaled_grouped_mm", a, weights, torch.tensor([30, 600, 70]))


def test_a_matrix_whose_scales_lie_across_the_sum():
    """One scale a row, and then the transpose: every term has its own."""
    a = quantized(normal(0, 5, 20), Format((1, 0)))
    b = quantized(normal(1, 7, 20), Format((0, 1)), turned=True)
    assert_as_reference("scaled_mm", a, b)


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
@pytest.mark.parametrize("tile", [(1, 16), (0, 0)])
def test_empty(shape, tile):
    rows, columns, terms = shape
    a, b = (quantized(torch.zeros(n, terms), Format(tile)) for n in (rows, columns))
    assert torch.equal(triton("scaled_mm", a, b), torch.zeros(rows, columns, dtype=torch.bfloat16))
    b_EFK = quantized(torch.zeros(2, columns, terms), Format(tile))
    found = triton("scaled_grouped_mm", a, b_EFK, torch.tensor([rows, 0]))
    assert torch.equal(found, torch.zeros(rows, columns, dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", ["ue8m0", "float"])
def test_numbers_that_are_not_finite_spoil_their_rows_and_columns_alone(scale):
    x, w = normal(0, 70, 40), normal(1, 150, 40)
    x[3, 5], x[66, 39], w[20, 0] = torch.inf, torch.nan, -torch.inf
    exact = torch.zeros(70, 150, dtype=torch.bool)
    exact[[3, 66]] = True
    exact[:, 16:32] = True
    a, b = quantized(x, Format((1, 16), scale)), quantized(w, Format((16, 16), scale))
    assert torch.equal(triton("scaled_mm", a, b).isnan(), exact)
    # Of two groups only the second has such weights.
    both = quantized(torch.stack([normal(2, 150, 40), w]), Format((16, 16), scale))
    found = triton("scaled_grouped_mm", a, both, torch.tensor([50, 20]))
    exact[:50, 16:32] = False
    exact[3] = True
    assert torch.equal(found.isnan(), exact)


@pytest.mark.parametrize("tile", [(1, 16), (1, 0), (0, 0)])
def test_an_empty_group_has_a_zero_gradient_whatever_the_scales(tile):
    x, counts = normal(0, 30, 20), torch.tensor([10, 0, 20])
    x[2, 4] = torch.nan
    a = reference_quantize.quantize_groups(x, counts, Format(tile))
    found = triton("scaled_grouped_inner_mm", a, a, counts)
    assert torch.equal(found.isnan(), reference.scaled_grouped_inner_mm(a, a, counts).isnan())
    assert not found[1].any()


def test_smallest_and_large_scales():
    """2^-127 is no normal number, and the product of two such scales would be zero."""
    data = torch.ones(2, 32).to(E4M3)
    small, large = (torch.tensor([[2.0**e], [1.0]]).to(torch.float8_e8m0fnu) for e in (-127, 120))
    format = Format((1, 32))
    found = triton("scaled_mm", QTensor(data, small, format), QTensor(data, large, format))
    assert found[0, 0] == 32 * 2**-7
    assert found[1, 1] == 32


class Configured:
    """Stands for a kernel that is tuned: takes the configuration it is told."""

    def __init__(self, kernel: Any, config: Any) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            assert constants["ALIGNED"] or not self.config.kwargs["TMA"]
            assert grid(self.config.kwargs)[0] > 0
            self.kernel[grid](*args, **constants, **self.config.all_kwargs())

        return launch


def with_config(index: int, op: str, operands: list[Any]) -> None:
    """Run an op with the kernel's configuration of that index."""
    from octofold.kernels.triton_scaled_mm_kernels import CONFIGS, TUNED

    tuned = TUNED[op]
    TUNED[op] = Configured(tuned.fn, CONFIGS[index])
    try:
        getattr(triton_scaled_mm, op)(*map(from_bytes, operands))
    finally:
        TUNED[op] = tuned


def ptx_of(index: int, op: str, *operands: QTensor | torch.Tensor) -> str:
    """Of the one kernel that runs, for Hopper."""
    (ptx,) = compiled(SM_90, f"{__name__}:with_config", index, op, [in_bytes(x) for x in operands]).values()
    return ptx


def operands_of(op: str, tile: tuple[int, int], scale: str, dtype: torch.dtype, terms: int) -> list[Any]:
    """As a GPU's quantisers lay them out; 256 rows, for grouped products of 3 groups."""
    activations, weights = Format(tile, scale, dtype), Format((128, 128) if tile == (1, 128) else tile, scale)
    counts = torch.tensor([100, 0, 156])
    if op == "scaled_grouped_inner_mm":
        inner = reference_quantize.quantize_groups(normal(0, 256, 256), counts, activations)
        inner = QTensor(inner.data.contiguous(), inner.scale.contiguous(), inner.format)
        return [inner, inner, counts]
    a = quantized(normal(0, 256, terms), activations)
    if op == "scaled_mm":
        return [a, quantized(normal(1, 256, terms), weights)]
    return [a, quantized(normal(1, 3, 256, terms), weights), counts]


BLOCK_SIZES = 5
"""Configurations with TMA; as many without follow them."""
TMA, COPIES = 1, BLOCK_SIZES + 1
"""Blocks of 128 x 128, and what PTX calls how they are loaded."""
LOADS = {TMA: "cp.async.bulk.tensor", COPIES: "cp.async.cg"}


@pytest.mark.parametrize("index", range(BLOCK_SIZES))
def test_every_block_size_compiles_for_hopper(index):
    ptx = ptx_of(index, "scaled_mm", *operands_of("scaled_mm", (1, 128), "ue8m0", E4M3, 512))
    assert "wgmma.mma_async" in ptx
    assert LOADS[TMA] in ptx


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("tile", "scale", "dtype", "terms", "index"),
    [
        ((1, 128), "float", E4M3, 512, TMA),
        ((1, 128), "ue8m0", E5M2, 576, COPIES),
        ((0, 0), "float", E5M2, 512, TMA),
        ((1, 32), "ue8m0", E4M3, 320, TMA),
    ],
)
def test_every_kernel_compiles_for_hopper(op, tile, scale, dtype, terms, index):
    ptx = ptx_of(index, op, *operands_of(op, tile, scale, dtype, terms))
    assert "wgmma.mma_async" in ptx
    assert LOADS[index] in ptx


@pytest.mark.parametrize("tile", [(16, 16), (128, 128)])
def test_odd_sizes_and_transposed_weights_compile_for_hopper(tile):
    a = quantized(normal(0, 255, 300), Format((1, tile[1])))
    b = quantized(normal(1, 77, 300), Format(tile), turned=True)
    assert "wgmma.mma_async" in ptx_of(COPIES, "scaled_mm", a, b)


@pytest.mark.parametrize("op", OPS)
def test_a_single_row_compiles_for_hopper(op):
    """Triton takes a size of one for a constant."""
    one, weight = (quantized(normal(0, 1, 128), Format(tile)) for tile in ((1, 128), (128, 128)))
    if op == "scaled_grouped_mm":
        weight = quantized(normal(0, 1, 1, 128), Format((128, 128)))
    counts = [] if op == "scaled_mm" else [torch.tensor([1])]
    assert ".entry" in ptx_of(TMA, op, one, one if op == "scaled_grouped_inner_mm" else weight, *counts)


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Workload("cpu", torch.bfloat16), "made for NVIDIA GPUs, the run is on cpu"),
        (Workload("npu", torch.bfloat16), "made for NVIDIA GPUs, the run is on npu"),
    ],
)
def test_why_unsupported(workload, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_scaled_mm.why_unsupported(workload) == reason


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    most = 2.5e-3 if found.dtype == torch.bfloat16 else 1e-5
    assert float((found.double() - exact.double()).norm()) <= most * float(exact.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tile", "weight_tile"), [((1, 128), (128, 128)), ((1, 32), (1, 32)), ((0, 0), (0, 0)), ((1, 16), (16, 16))]
)
def test_on_a_gpu(tile, weight_tile, out_dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    counts = torch.tensor([700, 0, 1, 2400, 899], device="cuda")
    rows, columns, terms = 4000, 1536, 2000
    x = reference_quantize.quantize(normal(rows, terms), Format(tile))
    w = reference_quantize.quantize(normal(columns, terms), Format(weight_tile))
    w_EFK = reference_quantize.quantize(normal(len(counts), columns, terms), Format(weight_tile))
    turned = reference_quantize.quantize(normal(len(counts), terms, columns), Format(weight_tile).transposed).t()
    dy = reference_quantize.quantize_groups(normal(rows, columns), counts, Format(tile, dtype=E5M2))
    inner = reference_quantize.quantize_groups(normal(rows, terms), counts, Format(tile))
    for op, operands in (
        ("scaled_mm", (x, w)),
        ("scaled_grouped_mm", (x, w_EFK, counts)),
        ("scaled_grouped_mm", (x, turned, counts)),
        ("scaled_grouped_inner_mm", (dy, inner, counts)),
    ):
        found = getattr(triton_scaled_mm, op)(*operands, out_dtype=out_dtype)
        assert_close(found, getattr(reference, op)(*operands, out_dtype=torch.float32))
