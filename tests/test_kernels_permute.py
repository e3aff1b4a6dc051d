"""Permutation of token copies around experts, against index arithmetic, and its gradients by finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels.permute import Order
from octofold.kernels.torch_permute import permute, unpermute

pytestmark = pytest.mark.usefixtures("poisoned")

EXPERTS = 5


@st.composite
def routings(draw: st.DrawFn) -> torch.Tensor:
    """Chosen experts, int64 [T, K], with zero tokens, unused experts and one expert that takes all among them."""
    tokens, copies = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    expert = st.just(2) if draw(st.booleans()) else st.integers(0, EXPERTS - 1)
    rows = draw(st.lists(st.lists(expert, min_size=copies, max_size=copies), min_size=tokens, max_size=tokens))
    return torch.tensor(rows, dtype=torch.int64).view(tokens, copies)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(experts_TK=routings())
def test_copies_are_sorted_by_expert_and_kept_in_token_order(experts_TK):
    copies = experts_TK.shape[1]
    chosen = experts_TK.flatten().tolist()
    order = Order.by_expert(experts_TK.flatten())
    expected = sorted(range(len(chosen)), key=lambda copy: (chosen[copy], copy))
    assert order.sorted_N.tolist() == expected
    assert [order.inverse_N[copy] for copy in expected] == list(range(len(chosen)))
    x_TD = normal(len(experts_TK), 3)
    assert torch.equal(permute(x_TD, order, copies), x_TD.repeat_interleave(copies, 0)[expected])


@given(experts_TK=routings(), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_unpermute_is_the_weighted_sum_over_copies(experts_TK, dtype):
    tokens, copies = experts_TK.shape
    order = Order.by_expert(experts_TK.flatten())
    y_ND, weights_TK = normal(tokens * copies, 3).to(dtype), normal(tokens, copies, seed=1).float()
    combined = unpermute(y_ND, weights_TK, order)
    assert combined.dtype == dtype
    expected = torch.zeros(tokens, 3, dtype=torch.float64)
    for place, copy in enumerate(order.sorted_N.tolist()):
        expected[copy // copies] += weights_TK.to(dtype).double().flatten()[copy] * y_ND[place].double()
    # Up to 3 terms, each of a size of a few units.
    assert torch.allclose(combined.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@given(experts_TK=routings())
def test_round_trips(experts_TK):
    tokens, copies = experts_TK.shape
    order = Order.by_expert(experts_TK.flatten())
    x_TD, y_ND = normal(tokens, 3), normal(tokens * copies, 3)
    assert torch.equal(permute(permute(y_ND, order), order.inverse), y_ND)
    halves = torch.full((tokens, copies), 1 / copies, dtype=torch.float64)
    torch.testing.assert_close(unpermute(permute(x_TD, order, copies), halves, order), x_TD)


@given(experts_TK=routings())
def test_gradients(experts_TK):
    tokens, copies = experts_TK.shape
    order = Order.by_expert(experts_TK.flatten())
    x_TD = normal(tokens, 2).requires_grad_()
    y_ND = normal(tokens * copies, 2).requires_grad_()
    weights_TK = normal(tokens, copies, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, order, copies), (x_TD,))
    assert torch.autograd.gradcheck(lambda y, weights: unpermute(y, weights, order), (y_ND, weights_TK))


def test_gradient_dtypes_are_the_operands():
    order = Order.by_expert(torch.tensor([1, 0, 0, 1]))
    y_ND = torch.ones(4, 2, dtype=torch.bfloat16, requires_grad=True)
    weights_TK = torch.full((2, 2), 0.3, requires_grad=True)
    unpermute(y_ND, weights_TK, order).sum().backward()
    assert y_ND.grad is not None
    assert weights_TK.grad is not None
    assert (y_ND.grad.dtype, weights_TK.grad.dtype) == (torch.bfloat16, torch.float32)
