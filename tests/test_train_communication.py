"""A run's metrics tell what its collectives cost, and sums by steps train as flat ones do."""

import math
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("runs"))


def groups_of(**backend: Any) -> dict[str, Any]:
    train = {"micro_batch_size": 1, "steps": 2}
    return {"parallel": {"data_shard": 4, "expert": 2}, "train": train, "backend": backend}


def test_costs_are_in_the_metrics(root, ranks, tmp_path):
    config = tiny_run(root, 4, **groups_of(ranks_per_node=2))
    for record in ranks(4).run(run_tasks.run, config, tmp_path)[0]["records"]:
        costs = record["communication"]
        assert {"expert/all_to_all", "expert_data/all_gather", "expert_data/reduce_scatter"} <= set(costs)
        assert all(cost["seconds"] > 0 for cost in costs.values())
        # Two expert ranks share a node; the shards of an expert lie on both.
        assert set(costs["expert/all_to_all"]["bytes"]) == {"node"}
        assert set(costs["expert_data/all_gather"]["bytes"]) == {"network"}
        # 4 ranks, 2 micro-batches, 3 layers with experts: tokens, outputs and the gradients of both; and in the forward
        # pass, counts of 4 experts for the other rank.
        counts_bytes = 4 * 2 * 3 * (4 * 8)
        assert costs["expert/all_to_all"]["calls"] == 4 * 2 * 3 * 5
        assert costs["expert/all_to_all"]["bytes"]["node"] == sum(record["sent_bytes"].values()) + counts_bytes


def test_counting_can_be_switched_off(root, tmp_path):
    config = tiny_run(root, train={"steps": 1, "log_communication": False})
    (record,) = run_tasks.alone(run_tasks.run, config, tmp_path)["records"]
    assert "communication" not in record


def test_sums_by_steps_train_alike(root, ranks, tmp_path):
    flat, steps = (
        ranks(4).run(run_tasks.run, tiny_run(root, 4, **groups_of(ranks_per_node=2, all_reduce=name)), tmp_path / name)[
            0
        ]
        for name in ("flat", "hierarchical")
    )
    for a, b in zip(flat["records"], steps["records"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-12)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-12)
    assert "world_in_node/reduce_scatter" in steps["records"][0]["communication"]
    assert "world_in_node/reduce_scatter" not in flat["records"][0]["communication"]
