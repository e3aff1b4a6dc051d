"""Experts that move between ranks while they are trained: only the load of the ranks depends on where they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.backends.errors import ConfigError
from octofold.parallel.placement import imbalance
from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.layout.facts import Arrays, RankFacts
from octofold.train.layout.record import record


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("placement"))


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        difference = np.abs(found[name] - array).max() / max(np.abs(array).max(), 1e-30)
        assert difference < 1e-9, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(
    ("n", "expert", "experts"),
    [
        pytest.param(2, 2, 8, id="2 ranks"),
        pytest.param(4, 2, 8, id="2 x 2 ranks", marks=pytest.mark.slow),
        pytest.param(4, 4, 8, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(4, 2, 6, id="2 x 2 ranks, three experts over two shards", marks=pytest.mark.slow),
    ],
)
def test_training_does_not_depend_on_where_experts_stand(n, expert, experts, root, ranks, tmp_path):
    """Losses, norms, loads, every gradient and the weights of four steps, between which experts move, in FP64."""

    def facts(every: int) -> list[RankFacts]:
        groups: dict[str, Any] = {
            "model": {"n_routed_experts": experts, "initializer_range": 0.15},
            "parallel": {"expert": expert, "placement_every": every},
            "train": {"steps": 4},
        }
        return ranks(n).run(record, tiny_run(root, n, **groups), tmp_path / str(every))

    for found, expected in zip(facts(1), facts(0), strict=True):
        assert_close(found.weights, expected.weights)
        for a, b in zip(found.steps, expected.steps, strict=True):
            assert a.report["loss"] == pytest.approx(b.report["loss"], rel=1e-9)
            assert a.report["grad_norm"] == pytest.approx(b.report["grad_norm"], rel=1e-9)
            assert a.report["expert_load"] == b.report["expert_load"]
            assert_close(a.gradients, b.gradients)
    moved = [step.report["moved_experts"] for step in found.steps]
    assert sum(moved[:-1]) > 0
    last = found.steps[-1].report
    logical = [imbalance(shares, list(range(experts)), expert) for shares in last["expert_load"].values()]
    assert last["rank_imbalance"] < max(logical), "the busiest rank has less to do than where nobody moved"


@pytest.mark.slow
def test_fp8_training_does_not_depend_on_where_experts_stand(root, ranks, tmp_path):
    """Weights are kept in FP8 until they change or move, and evaluated in between."""

    def losses(every: int) -> list[float]:
        groups: dict[str, Any] = {
            "parallel": {"expert": 2, "placement_every": every},
            "train": {"steps": 4, "eval_every": 1},
            "precision": {"name": "fp8_block", "block": 16, "arithmetic": "emulate"},
        }
        config = tiny_run(root, 2, **groups)
        return [r["loss"] for r in ranks(2).run(run_tasks.run, config, tmp_path / str(every))[0]["records"]]

    assert losses(1) == losses(0)


@pytest.mark.slow
def test_a_run_goes_on_wherever_its_experts_stood(root, ranks, tmp_path):
    """2 ranks, then 4, then one that holds all experts: one course, in FP64, from files in one order."""

    def config(n: int, every: int, **more: Any) -> Any:
        return tiny_run(root, n, train={"steps": 8}, parallel={"expert": n, "placement_every": every}, **more)

    expected = ranks(2).run(run_tasks.run, config(2, 0), tmp_path / "whole")[0]
    run_dir = tmp_path / "moved"
    ranks(2).run(run_tasks.run, config(2, 2), run_dir, 3)
    saved = read_manifest(run_dir / "checkpoints" / "step_3").state["placement"]
    assert saved["orders"], "experts have moved"
    assert saved["steps"] == 1, "the loads of step 3 count for the next move"
    ranks(4).run(run_tasks.run, config(4, 2, resume=str(run_dir)), run_dir, 6)
    found = run_tasks.alone(run_tasks.run, config(1, 0, resume=str(run_dir)), run_dir)
    assert [r["loss"] for r in found["records"]] == pytest.approx([r["loss"] for r in expected["records"]], rel=1e-9)
    assert_close(found["tensors"], expected["tensors"])


def test_a_resumed_run_is_the_same_run_bit_for_bit(root, ranks, tmp_path):
    groups: dict[str, Any] = {"parallel": {"expert": 2, "placement_every": 2}, "precision": {"name": "bf16"}}
    config = tiny_run(root, 2, train={"steps": 6}, **groups)
    whole = ranks(2).run(run_tasks.run, config, tmp_path / "whole")[0]
    ranks(2).run(run_tasks.run, config, tmp_path / "stopped", 3)
    resumed = tiny_run(root, 2, train={"steps": 6}, resume=str(tmp_path / "stopped"), **groups)
    again = ranks(2).run(run_tasks.run, resumed, tmp_path / "stopped")[0]
    for a, b in zip(again["records"], whole["records"], strict=True):
        names = ("step", "loss", "grad_norm", "expert_load", "rank_imbalance", "moved_experts")
        assert [a[name] for name in names] == [b[name] for name in names]
    for name, tensor in whole["tensors"].items():
        assert tensor.tobytes() == again["tensors"][name].tobytes(), name
    assert sum(record["moved_experts"] for record in whole["records"])


@pytest.mark.parametrize(
    ("parallel", "rule"),
    [
        ({"placement_every": -1}, "must be at least 0"),
        ({"placement_every": 5}, "experts that all stand on one rank have nowhere to go"),
    ],
)
def test_refused_by_name(parallel, rule, root):
    with pytest.raises(ConfigError, match=f"^parallel.placement_every={parallel['placement_every']}.*\n.*{rule}"):
        tiny_run(root, 2, parallel=parallel)
