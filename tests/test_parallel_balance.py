"""Expert biases move against the sign of the load error of the whole global batch; how evenly experts are used."""

import math

import pytest
import rank_tasks
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.parallel.balance import load_metrics

# One layer with loads whose error has another sign on each rank than over both; one with every expert at the mean.
LOADS_RGE = torch.tensor([[[6, 2, 4, 0], [5, 5, 0, 10]], [[0, 4, 0, 20], [5, 5, 10, 0]]])


def test_the_sign_is_that_of_the_global_load(ranks):
    for loads_GE, biases, counters in ranks(2).run(rank_tasks.balance, LOADS_RGE, 0.25):
        assert loads_GE.tolist() == [[6, 6, 4, 20], [10, 10, 10, 10]]
        # The mean of the first layer is 9. Rank 0 alone (mean 3) would have lowered experts 0 and 2, and raised 3.
        assert biases[0].tolist() == [0.75, 0.75, 0.75, 0.25]
        assert biases[1].tolist() == [0.5, 0.5, 0.5, 0.5], "at the mean nothing moves"
        assert not any(counter.any() for counter in counters), "counters begin again"


def test_a_rate_of_zero_moves_nothing(ranks):
    for _, biases, _ in ranks(2).run(rank_tasks.balance, LOADS_RGE, 0.0):
        assert all(bias.tolist() == [0.5] * 4 for bias in biases)


def test_load_metrics_of_plain_cases():
    loads_GE = torch.tensor([[5, 5, 5, 5], [0, 20, 0, 0], [10, 0, 10, 0], [1, 2, 3, 4]], dtype=torch.float64)
    metrics = load_metrics(loads_GE)
    assert metrics["imbalance"].tolist() == [1, 4, 2, 1.6]
    assert metrics["unused_share"].tolist() == [0, 0.75, 0.5, 0]
    shares = [0.1, 0.2, 0.3, 0.4]
    uneven = -sum(share * math.log(share) for share in shares) / math.log(4)
    assert metrics["load_entropy"].tolist() == pytest.approx([1, 0, 0.5, uneven])


def test_a_single_expert_is_even():
    metrics = load_metrics(torch.tensor([[7.0]], dtype=torch.float64))
    assert {name: of_G.tolist() for name, of_G in metrics.items()} == {
        "imbalance": [1],
        "unused_share": [0],
        "load_entropy": [1],
    }


@given(loads=st.lists(st.integers(0, 10**9), min_size=2, max_size=12).filter(any))
def test_load_metrics_stay_in_their_bounds(loads):
    loads_GE = torch.tensor([loads, [*reversed(loads)]], dtype=torch.float64)
    metrics = load_metrics(loads_GE)
    (imbalance, mirrored), experts = metrics["imbalance"].tolist(), len(loads)
    assert imbalance == mirrored
    assert 1 - 1e-12 <= imbalance <= experts
    assert metrics["unused_share"][0] == loads.count(0) / experts
    assert -1e-12 <= metrics["load_entropy"][0] <= 1 + 1e-12
