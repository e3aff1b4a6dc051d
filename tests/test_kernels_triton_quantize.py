"""Triton's quantisation: bit for bit the reference on Triton's interpreter, and compiled for GPUs that are not here."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_processes import SM_80, SM_90, compiled, interpreted

from octofold.kernels import triton_quantize
from octofold.kernels.qtensor import E4M3, E5M2, LARGEST, Format, QTensor
from octofold.kernels.reference import quantize as reference
from octofold.kernels.registry import Workload

MODULE = "octofold.kernels.triton_quantize"
TILES = [(1, 16), (16, 1), (16, 16), (1, 32), (48, 48), (1, 128), (128, 1), (128, 128), (0, 0), (1, 0), (0, 1)]
formats = st.builds(
    Format,
    tile=st.sampled_from(TILES),
    scale=st.sampled_from(["ue8m0", "float"]),
    dtype=st.sampled_from([E4M3, E5M2]),
    least_amax=st.sampled_from([0.0, 1e-4]),
)
extents = st.one_of(st.sampled_from([0, 1, 16, 128]), st.integers(1, 70))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)


def around(x: torch.Tensor) -> torch.Tensor:
    """FP32 numbers, their neighbours, and the negatives of all."""
    up, down = (torch.nextafter(x, torch.full_like(x, toward)) for toward in (math.inf, -math.inf))
    return torch.cat([x, up, down, -x, -up, -down])


def hard_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every positive number of the format, what is half way between two, FP32 subnormals; and all their neighbours."""
    codes = torch.arange(0x80, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()]
    halves = (codes[1:] + codes[:-1]) / 2
    return around(torch.cat([codes, halves, torch.tensor([2.0**-149, 2.0**-127, 2.0**-126, LARGEST[dtype] + 16])]))


def matrix(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """FP32, with parts that a quantiser may get wrong: numbers and halves of the format, zeros, sizes far apart, an
    outlier, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: torch.Tensor) -> torch.Tensor:
        return pool[torch.randint(len(pool), shape, generator=generator)]

    kinds = [
        draw(hard_numbers(dtype)),
        draw(torch.tensor([0.0, -0.0])),
        torch.randn(shape, generator=generator).ldexp(draw(torch.arange(-140, 100))),
        draw(torch.tensor([1e-3, 1e-3, 1e30])),
        torch.randn(shape, generator=generator),
    ]
    kind = kinds[seed % len(kinds)].flatten()
    places = torch.randint(max(kind.numel(), 1), (3 * (seed % 2),), generator=generator)
    kind[places[: kind.numel()]] = torch.tensor([math.nan, math.inf, -math.inf])[: len(places[: kind.numel()])]
    return kind.view(shape)


def assert_same(found: QTensor, expected: QTensor) -> None:
    """Every bit of data and scales, and every NaN; contiguous as the reference is."""
    assert found.format == expected.format
    assert found.data.is_contiguous()
    assert found.scale.is_contiguous()
    for name in ("data", "scale"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        nan = a.float().isnan()
        assert torch.equal(nan, b.float().isnan()), f"{name}: NaN"
        integers = torch.int32 if a.dtype == torch.float32 else torch.uint8
        differ = (a.view(integers) != b.contiguous().view(integers)) & ~nan
        assert not differ.any(), f"{name}: {differ.sum()} of {differ.numel()} differ"


@settings(max_examples=50)
@given(
    stack=st.lists(st.integers(0, 2), max_size=2),
    rows=extents,
    columns=extents,
    format=formats,
    of=dtypes,
    seed=seeds,
    strided=st.booleans(),
    transpose=st.booleans(),
)
def test_quantize(stack, rows, columns, format, of, seed, strided, transpose):
    x = matrix((*stack, rows, columns), format.dtype, seed).to(of)
    if strided:
        x = x.mT.contiguous().mT
    expected = reference.quantize(x, format, transpose=transpose)
    assert_same(interpreted(f"{MODULE}:quantize", x, format, transpose=transpose), expected)


@given(format=formats, of=dtypes, seed=seeds, transpose=st.booleans(), by=st.sampled_from(["matrix", "row", "tile"]))
def test_given_scales(format, of, seed, transpose, by):
    """They saturate what lies beyond; infinities and NaN still show."""
    x = matrix((2, 70, 50), format.dtype, seed).to(of)
    r, c = format.tiles(70, 50)
    shape = {"matrix": (), "row": (r, 1), "tile": (2, r, c)}[by]
    scale = torch.randint(-9, 3, shape, generator=torch.Generator().manual_seed(seed)).float().exp2()
    expected = reference.quantize(x, format, transpose=transpose, scale=scale)
    assert_same(interpreted(f"{MODULE}:quantize", x, format, transpose=transpose, scale=scale), expected)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_hard_number_is_rounded_to_the_nearest(dtype):
    """Ties, subnormals, ±448 and beyond, zeros of both signs, NaN: at a scale of 1 in FP32."""
    x = torch.cat([hard_numbers(dtype), torch.tensor([1e30, -1e30])])[None]
    format = Format((1, 128), dtype=dtype)
    expected = reference.quantize(x, format, scale=torch.ones(()))
    assert_same(interpreted(f"{MODULE}:quantize", x, format, scale=torch.ones(())), expected)


def test_strides_of_any_kind():
    """Every other column, a slice of a wider matrix, and a row repeated."""
    x = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    for view in (x[:, ::2], x[3:31, 7:70], x[:1].expand(20, -1), x[::3].t()):
        assert_same(interpreted(f"{MODULE}:quantize", view, Format((1, 16))), reference.quantize(view, Format((1, 16))))


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("extent", [triton_quantize.LONGEST_ROW, triton_quantize.LONGEST_ROW + 1])
def test_whole_rows_that_a_program_can_hold_and_that_it_cannot(extent, along_rows):
    x = torch.randn(3, extent, generator=torch.Generator().manual_seed(0))
    view, format = (x, Format((1, 0))) if along_rows else (x.t(), Format((0, 1)))
    found = interpreted(f"{MODULE}:quantize", view, format, transpose=not along_rows)
    assert_same(found, reference.quantize(view, format, transpose=not along_rows))


@given(
    counts=st.one_of(
        st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 130]), min_size=1, max_size=5), st.just([0] * 3), st.just([64])
    ),
    width=st.integers(1, 70),
    tile=st.sampled_from([(1, 16), (1, 32), (1, 48), (1, 128), (0, 0), (1, 0)]),
    scale=st.sampled_from(["ue8m0", "float"]),
    of=dtypes,
    seed=seeds,
    strided=st.booleans(),
    scale_is_given=st.booleans(),
)
def test_quantize_groups(counts, width, tile, scale, of, seed, strided, scale_is_given):
    format = Format(tile, scale)
    x_ND, counts_E = matrix((sum(counts), width), E4M3, seed).to(of), torch.tensor(counts)
    if strided:
        x_ND = x_ND.t().contiguous().t()
    given_scale = (torch.arange(width)[:, None] % 5 - 7).float().exp2() if tile[0] else torch.tensor(2.0**-6)
    options = {"scale": given_scale} if scale_is_given else {}
    expected = reference.quantize_groups(x_ND, counts_E, format, **options)
    assert_same(interpreted(f"{MODULE}:quantize_groups", x_ND, counts_E, format, **options), expected)


@given(rows=st.integers(0, 40), width=st.integers(1, 150), format=formats, of=dtypes, seed=seeds)
def test_swiglu_quantize(rows, width, format, of, seed):
    """The exponential may be off by a little: scales and numbers lie between those of slightly less and more."""
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(seed)).mul(4).to(of)
    found = interpreted(f"{MODULE}:swiglu_quantize", gate_up, format)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate * torch.sigmoid(gate) * up
    less, more = (reference.scales_of(reference.amax_of(exact * (1 + e), format), format) for e in (-1e-6, 1e-6))
    scale = found.scale.float()
    assert ((less <= scale) & (scale <= more)).all()
    slack = exact.abs() * 1e-6
    low, high = (reference.quantize(bound.float(), format, scale=scale) for bound in (exact - slack, exact + slack))
    assert ((low.data.float() <= found.data.float()) & (found.data.float() <= high.data.float())).all()


def test_swiglu_quantize_shows_what_is_not_finite():
    gate_up = torch.ones(4, 64)
    gate_up[1, 3], gate_up[2, 40], gate_up[3, 2] = math.nan, math.inf, -math.inf
    found = interpreted(f"{MODULE}:swiglu_quantize", gate_up, Format((1, 32)))
    assert found.scale.float().isnan().flatten().tolist() == [False, True, True, True]
    assert torch.equal(found.data.float().isnan().any(1), torch.tensor([False, True, True, True]))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def accesses(ptx: str) -> list[str]:
    """Widths of the accesses to global memory of numbers (scales are written one by one)."""
    return [access for access in re.findall(r"(?:ld|st)\.global\S*", ptx) if ".b8" not in access]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (1, 32)])
def test_compiles_for_hopper_to_wide_accesses(tile, transpose):
    """In either direction 16 bytes at a time, x once; and the chip's own cast."""
    kernels = compiled(SM_90, f"{MODULE}:quantize", meta(512, 1024), Format(tile), transpose=transpose)
    assert list(kernels) == ["quantize_kernel"]
    ptx = kernels["quantize_kernel"]
    assert ".target sm_90" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    loads = [access for access in accesses(ptx) if access.startswith("ld")]
    assert set(accesses(ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert len(loads) == 2 * (len(accesses(ptx)) - len(loads)), "two bytes read for each that is written"


@pytest.mark.parametrize("tile", [(0, 0), (1, 0), (0, 1)])
def test_scales_of_whole_extents_compile_for_hopper(tile):
    kernels = compiled(SM_90, f"{MODULE}:quantize", meta(384, 256), Format(tile))
    # A row is held by one program.
    assert list(kernels) == (["quantize_kernel"] if tile == (1, 0) else ["amax_kernel", "quantize_kernel"])
    assert compiled(SM_90, f"{MODULE}:quantize", meta(384, 256), Format(tile), scale=meta(dtype=torch.float32))


@pytest.mark.parametrize("tile", [(1, 128), (0, 0)])
def test_groups_compile_for_hopper(tile):
    """From shapes alone: a tensor of the meta device holds no counts that anybody could wait for."""
    x, counts_E = meta(384, 256), meta(8, dtype=torch.int64)
    kernels = compiled(SM_90, f"{MODULE}:quantize_groups", x, counts_E, Format(tile))
    assert kernels.keys() >= {"group_tiles_kernel", "quantize_kernel"}


def test_swiglu_compiles_for_hopper_to_one_kernel():
    assert list(compiled(SM_90, f"{MODULE}:swiglu_quantize", meta(384, 256), Format((1, 128)))) == ["quantize_kernel"]


@pytest.mark.parametrize(("capability", "has_a_cast"), [(SM_90, True), (SM_80, False)])
def test_e5m2_compiles_and_so_it_does_for_a_chip_without_the_cast(capability, has_a_cast):
    x = meta(128, 256, dtype=torch.float32)
    ptx = compiled(capability, f"{MODULE}:quantize", x, Format((1, 128), dtype=E5M2))["quantize_kernel"]
    assert ("cvt.rn.satfinite.e5m2x2.f32" in ptx) == has_a_cast


def test_division_is_exact_where_scales_are_no_powers_of_two():
    kernels = compiled(SM_90, f"{MODULE}:quantize", meta(128, 256), Format((1, 128), "float"))
    assert "div.rn.f32" in kernels["quantize_kernel"]
    assert not re.search(r"div\.(full|approx)", kernels["quantize_kernel"])


def test_why_unsupported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    workload = Workload("cpu", torch.bfloat16, formats=(Format((1, 128)),))
    assert triton_quantize.why_unsupported(workload) == "made for NVIDIA GPUs, the run is on cpu"
    assert interpreted(f"{MODULE}:why_unsupported", workload) is None
    gpu = Workload("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_quantize.why_unsupported(gpu) == "torch finds no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_quantize.why_unsupported(gpu) is None
    monkeypatch.setattr("octofold.kernels.triton_support.find_spec", lambda name: None)
    assert triton_quantize.why_unsupported(gpu) == "Triton is not installed"


@pytest.mark.gpu
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["ue8m0", "float"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("tile", TILES)
def test_on_a_gpu(tile, dtype, scale, of):
    """The chip's own cast, and its memory: bit for bit the reference on the CPU."""
    format = Format(tile, scale, dtype)
    for seed in range(10):
        x = matrix((2, 150, 272), dtype, seed).to(of)
        for view in (x, x.mT.contiguous().mT):
            for transpose in (False, True):
                found = triton_quantize.quantize(view.cuda(), format, transpose=transpose)
                on_cpu = QTensor(found.data.cpu(), found.scale.cpu(), found.format)
                assert_same(on_cpu, reference.quantize(view, format, transpose=transpose))
