"""Collectives between real ranks, against index arithmetic."""

import pytest
import rank_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 4])
@settings(max_examples=15)
@given(data=st.data(), trailing=st.sampled_from([(), (3,), (2, 2)]))
def test_all_to_all_and_its_gradient(ranks, n, data, trailing):
    """Blocks travel to their targets, and the gradients of what arrived travel back to the sources."""
    row = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    counts = data.draw(st.lists(row, min_size=n, max_size=n))
    blocks = [[normal(n * s + t, counts[s][t], *trailing) for t in range(n)] for s in range(n)]
    cotangents = [[normal(100 + n * s + t, counts[s][t], *trailing) for s in range(n)] for t in range(n)]
    outcomes = ranks(n).run(rank_tasks.exchange, blocks, [torch.cat(row) for row in cotangents])
    for rank, (received, gradient) in enumerate(outcomes):
        assert torch.equal(received, torch.cat([blocks[source][rank] for source in range(n)]))
        assert torch.equal(gradient, torch.cat([cotangents[target][rank] for target in range(n)]))


def test_exchange_counts(ranks):
    counts_RRL = torch.arange(2 * 2 * 3).view(2, 2, 3)
    for rank, received_RL in enumerate(ranks(2).run(rank_tasks.count_exchange, counts_RRL)):
        assert torch.equal(received_RL, counts_RRL[:, rank])
