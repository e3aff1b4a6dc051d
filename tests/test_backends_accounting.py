"""Bytes by class of link, against counting by hand; costs of ranks with different groups add up."""

from typing import Any, cast

import collective_tasks
import pytest
import torch

from octofold.backends.accounting import sent_bytes
from octofold.backends.observing import Call
from octofold.backends.topology import Topology

ROWS = torch.zeros(6, 5)
"""120 bytes."""


def call(op: str, inputs: list[torch.Tensor], peer: int | None = None, splits: list[int] | None = None) -> Call:
    return Call(op, cast(Any, None), inputs, peer, splits)


@pytest.mark.parametrize(
    ("issued", "own", "ranks", "expected"),
    [
        (call("all_to_all", [ROWS], splits=[1, 0, 5]), 0, 3, {1: 0, 2: 100}),
        (call("all_to_all", [ROWS], splits=[]), 1, 3, {0: 40, 2: 40}),
        (call("all_to_all", [ROWS, ROWS[:2]]), 0, 2, {1: 40}),
        (call("all_to_all", [ROWS[:0]], splits=[0, 0]), 0, 2, {1: 0}),
        (call("send", [ROWS], peer=2), 0, 4, {2: 120}),
        (call("receive", [ROWS], peer=2), 0, 4, {}),
        (call("all_gather", [ROWS]), 3, 4, {0: 360}),
        (call("reduce_scatter", [ROWS]), 0, 4, {1: 90}),
        (call("all_reduce", [ROWS]), 1, 4, {2: 180}),
        (call("all_reduce", [ROWS, ROWS]), 1, 2, {0: 240}),
        (call("all_reduce", [ROWS]), 0, 1, {}),
        (call("broadcast", [ROWS], peer=1), 1, 4, {2: 120}),
        (call("broadcast", [ROWS], peer=1), 0, 4, {}),
        (call("reduce", [ROWS], peer=1), 1, 4, {}),
        (call("reduce", [ROWS], peer=1), 3, 4, {0: 120}),
        (call("gather", [ROWS], peer=0), 2, 4, {0: 120}),
        (call("gather", [ROWS], peer=0), 0, 4, {}),
        (call("scatter", [ROWS, ROWS[:1]], peer=0), 0, 2, {1: 20}),
        (call("scatter", [], peer=0), 1, 2, {}),
        (call("barrier", [ROWS]), 1, 2, {}),
    ],
)
def test_bytes_of_a_call(issued, own, ranks, expected):
    assert sent_bytes(issued, own, ranks) == expected


def test_costs_of_all_ranks(ranks):
    """Four ranks on nodes of two. In a ring half of the ranks have their next one on the other node."""
    first, *others = ranks(4).run(collective_tasks.costs, Topology(2, 2), 2)
    assert all(other == first for other in others)
    assert list(first) == sorted(first)
    assert all(cost.pop("seconds") > 0 for cost in first.values())
    assert first == {
        # 12 bytes to each of three others: one on the node, two beyond; by four ranks, in two steps.
        "world/all_to_all": {"calls": 2, "bytes": {"node": 24, "network": 48}},
        # 2 · 3/4 · 32 bytes by each rank.
        "world/all_reduce": {"calls": 2, "bytes": {"node": 48, "network": 48}},
        "world/all_gather": {"calls": 2, "bytes": {"node": 24, "network": 24}},
        # 20 bytes from rank 1 to 2, 2 to 3, 3 to 0.
        "world/broadcast": {"calls": 2, "bytes": {"node": 10, "network": 20}},
        "first pair/all_reduce": {"calls": 1, "bytes": {"node": 8}},
        "second pair/all_reduce": {"calls": 1, "bytes": {"node": 8}},
    }
