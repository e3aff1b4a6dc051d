"""Triton's permutation and weighted sum: the reference on Triton's interpreter, and compiled for an absent GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_processes import SM_90, compiled, differentiated, interpreted

from octofold.kernels import triton_permute
from octofold.kernels.permute import Order
from octofold.kernels.reference import permute as reference
from octofold.kernels.registry import Workload

MODULE = "octofold.kernels.triton_permute"
EXPERTS = 5
WIDTHS = st.one_of(st.integers(1, 20), st.just(triton_permute.BLOCK + 3))
"""More columns than one program takes among them."""
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])


@st.composite
def routings(draw: st.DrawFn) -> torch.Tensor:
    """Chosen experts, int64 [T, K]: no tokens, unused experts and one expert that takes all among them."""
    tokens, copies = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    expert = st.just(2) if draw(st.booleans()) else st.integers(0, EXPERTS - 1)
    rows = draw(st.lists(st.lists(expert, min_size=copies, max_size=copies), min_size=tokens, max_size=tokens))
    return torch.tensor(rows, dtype=torch.int64).view(tokens, copies)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(*shape: int, dtype: torch.dtype, run_dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Standard normal; in runs in BF16 quarters up to 1, whose products and few sums BF16 holds exactly.

    Triton's interpreter cuts bits off where a GPU rounds to BF16: only what needs no rounding can be compared.
    """
    if run_dtype != torch.bfloat16:
        return normal(*shape, dtype=dtype, seed=seed)
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).div(4).to(dtype)


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Rounded once to its dtype, after sums of `terms` products of about 1."""
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    inner = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=16 * terms * inner)


@given(experts_TK=routings(), width=WIDTHS, dtype=DTYPES)
def test_permute(experts_TK, width, dtype):
    """Copies to the last bit; the gradient is the sum over copies, rounded once."""
    tokens, copies = experts_TK.shape
    order = Order.by_expert(experts_TK.flatten())
    x_TD = numbers(tokens, width, dtype=dtype, run_dtype=dtype).requires_grad_()
    grad_ND = numbers(tokens * copies, width, dtype=dtype, run_dtype=dtype, seed=1)
    found, grad = differentiated(f"{MODULE}:permute", x_TD, order, copies, cotangent=grad_ND)
    assert torch.equal(found, reference.permute(x_TD, order, copies))
    exact = grad_ND.double()[order.inverse_N].view(tokens, copies, width).sum(1)
    assert_near(grad, exact, dtype, copies)


@given(experts_TK=routings(), width=WIDTHS, dtype=DTYPES)
def test_unpermute(experts_TK, width, dtype):
    """The weighted sum and both gradients against FP64; weights are FP32 (FP64 in FP64) and rounded as y is."""
    tokens, copies = experts_TK.shape
    order = Order.by_expert(experts_TK.flatten())
    weight_dtype = torch.promote_types(dtype, torch.float32)
    y_ND = numbers(tokens * copies, width, dtype=dtype, run_dtype=dtype).requires_grad_()
    weights_TK = numbers(tokens, copies, dtype=weight_dtype, run_dtype=dtype, seed=1).requires_grad_()
    grad_TD = numbers(tokens, width, dtype=dtype, run_dtype=dtype, seed=2)
    found = differentiated(f"{MODULE}:unpermute", y_ND, weights_TK, order, cotangent=grad_TD)
    y_exact, weights_exact = (x.detach().to(dtype).double().requires_grad_() for x in (y_ND, weights_TK))
    out = reference.unpermute(y_exact, weights_exact, order)
    exact = (out.detach(), *torch.autograd.grad(out, (y_exact, weights_exact), grad_TD.double()))
    assert_near(found[0], exact[0], dtype, copies)
    assert_near(found[1], exact[1], dtype)
    assert_near(found[2], exact[2], weight_dtype, width)


def test_round_trip_and_the_inverse():
    order = Order.by_expert(torch.tensor([3, 0, 1, 0, 2, 2]))
    y_ND = normal(6, 5, dtype=torch.float32)
    permuted = interpreted(f"{MODULE}:permute", y_ND, order)
    assert torch.equal(interpreted(f"{MODULE}:permute", permuted, order.inverse), y_ND)


def test_strided_and_expanded_operands():
    """A transposed input, and the gradient of a plain sum, which has no memory of its own."""
    order = Order.by_expert(torch.tensor([1, 0, 0, 1]))
    x_TD = normal(3, 2, dtype=torch.float32).t().requires_grad_()
    ones = torch.ones(()).expand(4, 3)
    found, grad = differentiated(f"{MODULE}:permute", x_TD, order, 2, cotangent=ones)
    assert torch.equal(found, reference.permute(x_TD, order, 2))
    assert torch.equal(grad, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_any_bits_are_permuted(dtype):
    """As quantised rows are."""
    order = Order.by_expert(torch.tensor([1, 0, 0, 1, 2, 0]))
    x_TD = torch.arange(12).view(3, 4).to(dtype) + 200
    assert torch.equal(interpreted(f"{MODULE}:permute", x_TD, order, 2), reference.permute(x_TD, order, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_compiles_for_hopper(dtype):
    """Both directions of both ops, 16 bytes of a copy at a time, no atomics."""
    places = torch.empty(2, 64, dtype=torch.int64, device="meta")
    order = Order(*places)
    x_TD = torch.empty(8, 2048, dtype=dtype, device="meta", requires_grad=True)
    y_ND = torch.empty(64, 2048, dtype=dtype, device="meta", requires_grad=True)
    weights_TK = torch.empty(8, 8, device="meta", requires_grad=True)
    kernels = compiled(SM_90, f"{MODULE}:permute", x_TD, order, 8)
    assert kernels.keys() == {"spread_kernel", "combine_kernel"}
    assert "st.global.v4.b32" in kernels["spread_kernel"] or "st.global.v2.b64" in kernels["spread_kernel"]
    kernels |= compiled(SM_90, f"{MODULE}:unpermute", y_ND, weights_TK, order)
    assert kernels.keys() == {"spread_kernel", "combine_kernel", "uncombine_kernel"}
    for ptx in kernels.values():
        assert ".target sm_90" in ptx
        assert "atom." not in ptx
        assert "red.global" not in ptx


def test_why_unsupported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = Workload("cpu", torch.float64)
    assert triton_permute.why_unsupported(on_cpu) == "made for NVIDIA GPUs, the run is on cpu"
    assert interpreted(f"{MODULE}:why_unsupported", on_cpu) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_a_gpu(dtype):
    """Results and gradients as the reference computes them there."""
    tokens, copies, width = 300, 8, 2056
    order = Order.by_expert(torch.arange(tokens * copies, device="cuda") * 7919 % 64)
    x_TD = normal(tokens, width, dtype=dtype).cuda().requires_grad_()
    weights_TK = normal(tokens, copies, dtype=torch.float32, seed=1).cuda().requires_grad_()
    grad_TD = normal(tokens, width, dtype=dtype, seed=2).cuda()
    outcomes = []
    for module in (triton_permute, reference):
        copies_ND = module.permute(x_TD, order, copies)
        combined_TD = module.unpermute(copies_ND, weights_TK, order)
        outcomes.append((copies_ND, combined_TD, *torch.autograd.grad(combined_TD, (x_TD, weights_TK), grad_TD)))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
