"""torch's scaled product against the reference, and what it says it cannot do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels import torch_scaled_mm
from octofold.kernels.qtensor import E4M3, E5M2, Format
from octofold.kernels.reference.quantize import quantize
from octofold.kernels.reference.scaled_mm import scaled_mm as reference
from octofold.kernels.registry import Workload

pytestmark = pytest.mark.usefixtures("poisoned")

TENSOR, ROW, TILE, BLOCK = (0, 0), (1, 0), (1, 128), (128, 128)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    assert found.shape == exact.shape
    assert float((found - exact).norm()) <= most * float(exact.norm())


sizes = st.one_of(st.integers(1, 40), st.sampled_from([16, 48]))


@given(
    rows=sizes,
    columns=sizes,
    terms=sizes,
    tiles=st.sampled_from([(TENSOR, TENSOR), (ROW, ROW), (ROW, TENSOR), (TENSOR, ROW)]),
    scale=st.sampled_from(["float", "ue8m0"]),
    dtype=st.sampled_from([E4M3, E5M2]),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_against_the_reference(rows, columns, terms, tiles, scale, dtype, turned, seed):
    a = quantize(normal(seed, rows, terms), Format(tiles[0], scale, dtype))
    turned = turned and tiles[1] == TENSOR
    b_format = Format(tiles[1], scale)
    b = (
        quantize(normal(seed + 1, terms, columns), b_format).t()
        if turned
        else quantize(normal(seed + 1, columns, terms), b_format)
    )
    exact = reference(a, b, out_dtype=torch.float32)
    # On CPUs torch rounds to BF16 twice, before it scales and after.
    for out_dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        found = torch_scaled_mm.scaled_mm(a, b, out_dtype=out_dtype)
        assert found.dtype == out_dtype
        assert_close(found.float(), exact, most)


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
@pytest.mark.parametrize("tile", [TENSOR, ROW])
def test_empty(shape, tile):
    rows, columns, terms = shape
    a, b = (quantize(torch.zeros(n, terms), Format(tile)) for n in (rows, columns))
    assert torch.equal(torch_scaled_mm.scaled_mm(a, b), torch.zeros(rows, columns, dtype=torch.bfloat16))


def test_a_row_that_is_not_finite_spoils_itself_alone():
    x, w = normal(0, 20, 32), normal(1, 24, 32)
    x[3, 5] = torch.inf
    out = torch_scaled_mm.scaled_mm(quantize(x, Format(ROW)), quantize(w, Format(ROW)))
    assert out.isnan().all(dim=1).nonzero().tolist() == [[3]]
    assert out.isnan().sum() == 24


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Workload("cpu", torch.bfloat16, formats=(Format(TENSOR), Format(ROW, "float"))), None),
        (Workload("cpu", torch.bfloat16, formats=(Format(TILE), Format(BLOCK))), "not [(1, 128), (128, 128)]"),
        (Workload("cpu", torch.bfloat16, formats=(Format((1, 32)),)), "not [(1, 32)]"),
        (Workload("cpu", torch.bfloat16, formats=(Format(TENSOR),), accumulation="hopper"), "not as hopper"),
        (Workload("npu", torch.bfloat16, formats=(Format(TENSOR),)), "no scaled product on npu"),
    ],
)
def test_why_unsupported(workload, reason):
    found = torch_scaled_mm.why_unsupported(workload)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [(TENSOR, TENSOR), (ROW, ROW), (TILE, BLOCK), (TILE, TILE)])
@pytest.mark.parametrize("shape", [(1000, 1536, 2048), (4096, 2048, 1000)])
def test_on_a_gpu(shape, tiles):
    rows, columns, terms = shape
    a = quantize(normal(0, rows, terms).cuda(), Format(tiles[0]))
    b = quantize(normal(1, columns, terms).cuda(), Format(tiles[1]))
    workload = Workload("cuda", torch.bfloat16, formats=(a.format, b.format))
    if reason := torch_scaled_mm.why_unsupported(workload):
        pytest.skip(reason)
    assert_close(torch_scaled_mm.scaled_mm(a, b).float(), reference(a, b, out_dtype=torch.float32), 3e-3)
