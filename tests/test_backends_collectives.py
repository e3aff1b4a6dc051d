"""Collectives between real ranks, against index arithmetic."""

import rank_tasks
import torch


def test_exchange_counts(ranks):
    counts_RRL = torch.arange(2 * 2 * 3).view(2, 2, 3)
    for rank, received_RL in enumerate(ranks(2).run(rank_tasks.count_exchange, counts_RRL)):
        assert torch.equal(received_RL, counts_RRL[:, rank])
