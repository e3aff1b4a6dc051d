"""Collectives between real ranks, against index arithmetic."""

import collective_tasks
import rank_tasks
import torch


def test_exchange_counts(ranks):
    counts_RRL = torch.arange(2 * 2 * 3).view(2, 2, 3)
    for rank, received_RL in enumerate(ranks(2).run(rank_tasks.count_exchange, counts_RRL)):
        assert torch.equal(received_RL, counts_RRL[:, rank])


def test_texts_of_all_ranks(ranks):
    for own in ([b"a", b"longer"], [b"", b""], [bytes(range(256)), b""]):
        assert ranks(2).run(collective_tasks.texts, own) == [own, own]


def test_messages_arrive_in_order(ranks):
    assert ranks(2).run(collective_tasks.round_trip) == [[[1.0], [1.0] * 3], [[0.0], [0.0] * 3]]


def test_stacks(ranks):
    x_RRN = torch.arange(2 * 2 * 3.0).view(2, 2, 3)
    for rank, (gathered, summed) in enumerate(ranks(2).run(collective_tasks.stacks, x_RRN)):
        assert torch.equal(gathered, x_RRN[:, 0])
        assert torch.equal(summed, x_RRN.sum(0)[rank])
