"""Experts on other ranks compute what local ones do, in FP64: results, gradients of tokens and of weights."""

from dataclasses import replace
from typing import Any

import pytest
import rank_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALL

from octofold.parallel.expert import LocalExperts
from octofold.parallel.local_ranks import LocalRanks

EXPERTS = 4
MODEL = replace(SMALL, hidden_size=5, moe_intermediate_size=3, n_routed_experts=EXPERTS)
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
"""FP64; a weight's gradient is summed in another order."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_as_local(started: LocalRanks, counts: list[list[int]]) -> None:
    """`counts[rank][expert]`: rows that each rank sends to each expert."""
    weights = {
        "gate_up_proj": normal(EXPERTS, 2 * MODEL.moe_intermediate_size, MODEL.hidden_size, seed=100),
        "down_proj": normal(EXPERTS, MODEL.hidden_size, MODEL.moe_intermediate_size, seed=101),
    }
    x = [normal(sum(row), MODEL.hidden_size, seed=rank) for rank, row in enumerate(counts)]
    found = started.run(rank_tasks.run_experts, MODEL, weights, x, counts)
    expected = [rank_tasks.through_experts(LocalExperts(), MODEL, weights, *own) for own in zip(x, counts, strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a["y"], b["y"], **EXACT)
        torch.testing.assert_close(a["x"], b["x"], **EXACT)
    for name in weights:
        summed = torch.stack([gradients[name] for gradients in expected]).sum(0)
        torch.testing.assert_close(torch.cat([gradients[name] for gradients in found]), summed, **EXACT)


CASES = {
    "even": [[2, 2, 2, 2]] * 4,
    "uneven": [[3, 0, 1, 7], [0, 5, 0, 0], [1, 1, 1, 1], [0, 0, 0, 9]],
    "one expert takes all": [[0, 0, 6, 0], [0, 0, 2, 0], [0, 0, 1, 0], [0, 0, 4, 0]],
    "a rank without tokens": [[0, 0, 0, 0], [3, 0, 2, 1], [0, 0, 0, 0], [1, 2, 0, 0]],
    "no tokens at all": [[0, 0, 0, 0]] * 4,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [2, 4])
def test_exchanged_experts(ranks, n, case):
    assert_as_local(ranks(n), CASES[case][:n])


@pytest.mark.parametrize("n", [2, 4])
@settings(max_examples=20)
@given(data=st.data())
def test_exchanged_experts_for_any_counts(ranks, n, data):
    row = st.lists(st.integers(0, 6), min_size=EXPERTS, max_size=EXPERTS)
    assert_as_local(ranks(n), data.draw(st.lists(row, min_size=n, max_size=n)))
