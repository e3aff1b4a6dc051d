"""Products on a CPU without BF16 instructions: as those of the CPU that has them, up to the order of a sum."""

import pytest
import torch
from torch import nn

from octofold.backends import cpu
from octofold.kernels import cpu_products
from octofold.kernels.cpu_attention import attention
from octofold.kernels.cpu_grouped_mm import grouped_mm


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """Both ways on whatever CPU runs the test."""
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: request.param)
    return request.param


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_the_cpu_says_whether_it_has_them():
    assert cpu.multiplies_bf16() == cpu.CpuBackend().capabilities(0).bf16


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 65, 7), (64, 64, 128), (0, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_matrices(shape, dtype, instructions):
    n, k, m = shape
    a, b = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype).t()
    exact = a.double() @ b.double()
    found, into = cpu_products.matmul(a, b), torch.full((n, m), torch.nan, dtype=dtype)
    cpu_products.matmul_into(a, b, into)
    assert found.dtype == into.dtype == dtype
    assert found.shape == exact.shape
    if n:
        bound = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        assert max(error(found, exact), error(into, exact)) < bound


def test_one_rounding_to_bf16_and_no_more():
    a, b = torch.randn(50, 300, dtype=torch.bfloat16), torch.randn(300, 40, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "multiplies_bf16", lambda: False)
        found = cpu_products.matmul(a, b)
    nearest = (a.double() @ b.double()).to(torch.bfloat16)
    assert (found != nearest).float().mean() < 0.01, "only where FP32 rounds across the middle"


def test_a_linear_layer_and_its_gradients(instructions):
    x = torch.randn(2, 9, 33, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(17, 33, dtype=torch.bfloat16, requires_grad=True)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    grad = torch.randn(2, 9, 17)
    out = cpu_products.linear(x, weight)
    out.backward(grad.bfloat16())
    exact = nn.functional.linear(exact_x, exact_weight)
    exact.backward(grad.bfloat16().double())
    for found, expected in ((out, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found.dtype == torch.bfloat16
        assert error(found.detach(), expected.detach()) < 4e-3


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    monkeypatch.setattr(cpu_products, "multiplies_bf16", lambda: False)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    weight = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    cpu_products.linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad.shape == (3, 8)


def test_experts_and_attention_take_them(instructions):
    counts_E = torch.tensor([5, 0, 70, 1])
    x_ND = torch.randn(int(counts_E.sum()), 32, dtype=torch.bfloat16, requires_grad=True)
    w_EFD = torch.randn(4, 24, 32, dtype=torch.bfloat16, requires_grad=True)
    grouped_mm(x_ND, w_EFD, counts_E).sum().backward()
    rows = zip(x_ND.detach().double().split(counts_E.tolist()), w_EFD.detach().double(), strict=True)
    expected = torch.cat([x @ w.t() for x, w in rows])
    assert error(grouped_mm(x_ND, w_EFD, counts_E).detach(), expected) < 4e-3
    assert w_EFD.grad[1].abs().max() == 0
    q, k, v = (torch.randn(1, 2, 150, width, dtype=torch.bfloat16) for width in (24, 24, 16))
    exact = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=24**-0.5
    )
    assert error(attention(q, k, v, scale=24**-0.5), exact) < 2e-2
