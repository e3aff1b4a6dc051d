"""Slow ranks are named: those that compute longer than others of their stage, whatever all wait."""

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.train.slow_ranks import slow_ranks


@pytest.mark.parametrize(
    ("seconds", "stages", "slow"),
    [
        ([1.0, 1.1, 0.9, 1.0], 1, {}),
        ([1.0, 1.0, 3.0, 1.0], 1, {"2": 3.0}),
        ([1.0, 2.5], 1, {"1": 2.5}),
        ([3.0, 3.0, 1.0, 1.0], 2, {}),
        ([3.0, 3.0, 1.0, 3.5], 2, {"3": 3.5}),
        ([1.0, 9.0, 3.0], 3, {}),
        ([0.001, 0.04, 0.001], 1, {}),
        ([0.0, 0.2, 0.0], 1, {"1": 200000.0}),
    ],
)
def test_a_rank_is_slow_beside_others_that_do_the_same(seconds, stages, slow):
    assert slow_ranks(seconds, stages=stages, factor=2.0) == slow


def test_no_factor_names_nobody():
    assert slow_ranks([1.0, 9.0], stages=1, factor=0.0) == {}


def test_a_slow_rank_is_named_in_console_and_metrics(ranks, tmp_path):
    root = write_corpus(tmp_path)
    train = {"steps": 3, "global_batch_size": 6, "micro_batch_size": 2}
    config = tiny_run(root, 3, train=train, model={"num_hidden_layers": 2})
    done = ranks(3).run(run_tasks.run_with_slow_rank, config, tmp_path / "run", 1, 1.0)[0]
    first, *rest = done["records"]
    assert "slow_ranks" not in first, "the first step warms up"
    for record in rest:
        assert set(record["slow_ranks"]) == {"1"}
        assert record["compute_s"]["slowest"] >= 1.0
        assert record["compute_s"]["slowest"] > 2 * record["compute_s"]["median"]
    assert "warning: step 2: rank 1 is slow: it computes" in done["printed"]
