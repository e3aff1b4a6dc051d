"""Sequences that several ranks share: who holds which positions, what exchanges give, and their gradients, in FP64."""

from functools import reduce

import pytest
import sequence_tasks
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.kernels.reference.attention import attention
from octofold.parallel.sequence import in_order, positions_of, windows

LAYOUTS = [(1, 2), (2, 1), (2, 2), (4, 1)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(ranks=st.integers(1, 9), size=st.integers(1, 5))
def test_context_ranks_hold_every_position_once_and_have_as_much_to_do(ranks, size):
    length = size * (2 * ranks if ranks > 1 else 1)
    held = [[p for begin, end in windows(length, rank, ranks) for p in range(begin, end)] for rank in range(ranks)]
    assert sorted(p for positions in held for p in positions) == list(range(length))
    # A query at position p looks at p + 1 keys.
    assert len({sum(p + 1 for p in positions) for positions in held}) == 1
    x_1S = torch.arange(length)[None]
    parts = [positions_of(x_1S, rank, ranks) for rank in range(ranks)]
    assert [part[0].tolist() for part in parts] == held
    assert torch.equal(in_order(torch.cat(parts, dim=1), ranks), x_1S)


@pytest.mark.parametrize(("context", "tensor"), LAYOUTS)
def test_exchanges_and_their_gradients(ranks, context, tensor):
    x_BSw = normal(2, 16, 3)
    found = ranks(context * tensor).run(sequence_tasks.exchanged, context, tensor, x_BSw)
    for rank, one in enumerate(found):
        peers = [found[rank // tensor * tensor + t] for t in range(tensor)]
        assert torch.equal(one["own"], one["held"].chunk(tensor, dim=1)[rank % tensor])
        assert torch.equal(one["enter"], one["held"])
        assert torch.equal(one["everyone"], x_BSw)
        assert torch.allclose(one["mean"], x_BSw.mean(1), rtol=1e-14)
        # All tensor ranks' uses of these positions, each with its weight rank + 1.
        uses = sum(rank // tensor * tensor + t + 1 for t in range(tensor))
        assert torch.allclose(one["enter_gradient"], uses * one["own"].cos(), rtol=1e-12)
        everyone = sum(range(1, context * tensor + 1))
        assert torch.allclose(one["everyone_gradient"], everyone * one["own"].cos(), rtol=1e-12)
        expected = x_BSw.mean(1).cos()[:, None] / x_BSw.shape[1]
        assert torch.allclose(one["mean_gradient"], expected.expand_as(one["own"]), rtol=1e-12)
        total = reduce(torch.add, [peer["held"] * (t + 1) for t, peer in enumerate(peers)])
        assert torch.allclose(one["leave"], total.chunk(tensor, dim=1)[rank % tensor], rtol=1e-12)
        assert torch.allclose(one["leave_gradient"], total.cos(), rtol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("context", [2, 4])
def test_attention_over_context_ranks_is_that_of_the_whole_sequence(ranks, context, documents):
    length = 24
    qkv = [normal(2, 3, length, width, seed=width) for width in (5, 5, 4)]
    # Documents that begin and end inside chunks, and one of a single token.
    starts = torch.tensor([[0, 5, 6, 17], [0, 1, 12, 23]])
    doc_ids_BS = (torch.arange(length)[None, :, None] >= starts[:, None]).sum(-1) - 1 if documents else None
    inputs = [x.clone().requires_grad_() for x in qkv]
    expected = attention(*inputs, scale=0.3, doc_ids_BS=doc_ids_BS)
    expected.sin().sum().backward()
    found = ranks(context).run(sequence_tasks.attended, context, qkv, doc_ids_BS)
    for rank, (out, (grad_q, grad_k, grad_v)) in enumerate(found):

        def own(x_BHSw: torch.Tensor | None, rank: int = rank) -> torch.Tensor:
            assert x_BHSw is not None
            return positions_of(x_BHSw.transpose(1, 2), rank, context).transpose(1, 2)

        assert torch.allclose(out, own(expected.detach()), rtol=1e-12)
        assert torch.allclose(grad_q, own(inputs[0].grad), rtol=1e-10, atol=1e-13)
        for found_gradient, x in ((grad_k, inputs[1]), (grad_v, inputs[2])):
            assert torch.allclose(found_gradient, x.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("n", [2, 4])
def test_rows_of_a_table_that_ranks_split(ranks, n):
    table = normal(12, 5).requires_grad_()
    tokens = torch.tensor([[0, 11, 3, 3], [5, 6, 11, 0]])
    rows = torch.nn.functional.embedding(tokens, table)
    rows.sin().sum().backward()
    assert table.grad is not None
    for rank, (found, gradient) in enumerate(ranks(n).run(sequence_tasks.looked_up, table.detach(), tokens)):
        assert torch.equal(found, rows.detach().chunk(n, dim=1)[rank])
        assert torch.allclose(gradient, table.grad.chunk(n)[rank], rtol=1e-13)
