"""Whole runs of a tiny model through pipelines: every schedule computes what one rank computes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus
from safetensors import safe_open
from test_train_run import assert_equal_runs

from octofold.parallel.local_ranks import LocalRanks
from octofold.parallel.pipeline_split import SCHEDULES
from octofold.train.models.config import BalanceConfig

Ranks = Callable[[int], LocalRanks]
MTP: dict[str, Any] = {"num_nextn_predict_layers": 1}
TIED: dict[str, Any] = {**MTP, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("runs"))


def groups_of(model: dict[str, Any], micro: int, parallel: dict[str, Any]) -> dict[str, Any]:
    balance = {"sequence_loss": 0.01, "z_loss": 0.01}
    return {
        "model": {"balance": BalanceConfig(**balance), **model},
        "parallel": parallel,
        "train": {"micro_batch_size": micro},
        "data": {"mask_documents": True},
    }


@pytest.fixture(scope="module")
def run_alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The same run on one rank in one micro-batch, computed once."""
    done: dict[str, dict[str, Any]] = {}

    def run(model: dict[str, Any]) -> dict[str, Any]:
        if str(model) not in done:
            config = tiny_run(root, **groups_of(model, 8, {}))
            done[str(model)] = run_tasks.alone(run_tasks.run_with_gradients, config, tmp_path_factory.mktemp("alone"))
        return done[str(model)]

    return run


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's records; tensors and gradients of all ranks, of which the same ones must agree."""
    parts: dict[str, run_tasks.Arrays] = {"tensors": {}, "gradients": {}}
    for rank in found:
        for part, arrays in parts.items():
            for name, array in rank.get(part, {}).items():
                assert name not in arrays or arrays[name].tobytes() == array.tobytes(), name
                arrays[name] = array
    return {**found[0], **parts}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_equals_one_rank(schedule, root, ranks, run_alone, tmp_path):
    """Losses, balance losses, gradients, norms, loads of all layers, moments, biases and weights after 3 steps."""
    expected = run_alone(MTP)
    config = tiny_run(root, 2, **groups_of(MTP, 2, {"pipeline": 2, "pipeline_schedule": schedule}))
    found = joined(ranks(2).run(run_tasks.run_with_gradients, config, tmp_path))
    assert_equal_runs(found, expected, 1e-9)
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert a["mtp_losses"] == pytest.approx(b["mtp_losses"], rel=1e-9)
        assert a["sequence_loss"] == pytest.approx(b["sequence_loss"], rel=1e-6)
        assert a["balance"].keys() == b["balance"].keys()


COMBINED = [
    pytest.param({"data_shard": 2, "expert": 2}, "1f1b", MTP, id="data and experts"),
    pytest.param({"data_shard": 2, "expert": 2}, "dualpipev", MTP, id="data and experts, both ends on a rank"),
    pytest.param({"tensor": 2}, "zbv", TIED, id="tensor, tied head"),
    pytest.param({"context": 2}, "interleaved", MTP, id="context"),
    pytest.param({"data_replicate": 2, "pipeline_split": [1, 3]}, "gpipe", TIED, id="replicas, uneven, tied head"),
]


@pytest.mark.parametrize(("parallel", "schedule", "model"), COMBINED)
def test_a_pipeline_with_other_layouts_equals_one_rank(parallel, schedule, model, root, ranks, run_alone, tmp_path):
    degrees = {"pipeline": 2, "pipeline_schedule": schedule, **parallel}
    config = tiny_run(root, 4, **groups_of(model, 1, degrees))
    found = joined(ranks(4).run(run_tasks.run_with_gradients, config, tmp_path))
    assert_equal_runs(found, run_alone(model), 1e-9)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_nan_on_one_stage_skips_the_update_on_every_rank(schedule, bad_rank, root, ranks, tmp_path):
    """The other stage's gradients are finite. Weights, moments and biases are those of one rank that skips, too."""
    expected = run_tasks.alone(
        run_tasks.run_with_nan_gradient, tiny_run(root, **groups_of(MTP, 8, {})), tmp_path / "one", 2, 0
    )
    config = tiny_run(root, 2, **groups_of(MTP, 2, {"pipeline": 2, "pipeline_schedule": schedule}))
    found = ranks(2).run(run_tasks.run_with_nan_gradient, config, tmp_path / "two", 2, bad_rank)
    assert [rank["applied"] for rank in found] == [[True, False, True]] * 2
    assert [rank["updates"] for rank in found] == [2, 2]
    assert [record["applied"] for record in found[0]["records"]] == [True, False, True]
    whole = joined(found)
    for record in (*whole["records"], *expected["records"]):
        assert math.isfinite(record["grad_norm"]) == record.pop("applied")
        record["grad_norm"] = record["grad_norm"] if math.isfinite(record["grad_norm"]) else 0.0
    del whole["gradients"]
    assert_equal_runs(whole, expected, 1e-9)


def test_a_run_moves_between_pipelines_and_one_rank(root, ranks, run_alone, tmp_path):
    """Two stages, then one rank, then both ends on one of two ranks: one curve, and each tensor saved once."""
    groups = groups_of(MTP, 2, {"pipeline": 2})
    run_dir = tmp_path / "moved"
    ranks(2).run(run_tasks.run, tiny_run(root, 2, **groups), run_dir, 1)
    saved = {name for path in (run_dir / "checkpoints" / "step_1").glob("*.safetensors") for name in names_in(path)}
    alone = tiny_run(root, **groups_of(MTP, 4, {}), resume=str(run_dir))
    run_tasks.alone(run_tasks.run, alone, run_dir, 2)
    moved = groups_of(MTP, 2, {"pipeline": 2, "pipeline_schedule": "interleaved"})
    found = joined(ranks(2).run(run_tasks.run, tiny_run(root, 2, **moved, resume=str(run_dir)), run_dir))
    expected = run_alone(MTP)
    assert saved == expected["tensors"].keys()
    found.pop("gradients")
    assert_equal_runs(found, expected, 1e-9)


def names_in(path: Path) -> list[str]:
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(root, ranks, tmp_path):
    groups = groups_of(MTP, 2, {"pipeline": 2})
    ranks(2).run(run_tasks.run, tiny_run(root, 2, **groups), tmp_path, 1)
    deeper = groups_of({**MTP, "num_hidden_layers": 5}, 2, {"pipeline": 2})
    for message in ranks(2).run(run_tasks.load_error, tiny_run(root, 2, **deeper, resume=str(tmp_path)), tmp_path):
        assert "model.layers.4.input_layernorm.weight: not in the checkpoint" in message


def test_validation_and_text_are_those_of_one_rank(root, ranks, tmp_path):
    groups = groups_of(MTP, 4, {})
    run_tasks.alone(run_tasks.run, tiny_run(root, **groups), tmp_path / "run")
    requests: list[dict[str, Any]] = [{}, {"tokens": 30, "context": 16, "temperature": 0.8, "seed": 3}]
    resumed = tiny_run(root, **groups, resume=str(tmp_path / "run"))
    validated = run_tasks.alone(run_tasks.validate, resumed, tmp_path / "a")["record"]
    texts, _ = run_tasks.alone(run_tasks.write, resumed, tmp_path / "b", requests)
    for schedule in ("1f1b", "interleaved"):
        piped = groups_of(MTP, 2, {"pipeline": 2, "pipeline_schedule": schedule})
        config = tiny_run(root, 2, **piped, resume=str(tmp_path / "run"))
        for found in ranks(2).run(run_tasks.validate, config, tmp_path / schedule):
            assert found["record"]["loss"] == pytest.approx(validated["loss"], rel=1e-12)
            assert found["record"]["tokens"] == validated["tokens"]
            assert found["training"]
        for found in ranks(2).run(run_tasks.write, config, tmp_path / schedule, requests):
            assert found == (texts, True)


@pytest.mark.parametrize(("schedule", "precision"), [("1f1b", "fp8_tensor_delayed"), ("dualpipev", "fp8_block")])
def test_fp8_states_and_their_health_are_those_of_one_rank(schedule, precision, root, ranks, tmp_path):
    """Histories, watched modules and how often each was seen; the loss within what rounding may do."""
    groups = groups_of(MTP, 2, {"pipeline": 2, "pipeline_schedule": schedule})
    settings = {"name": precision, "arithmetic": "emulate", "block": 16, "watch_every": 1}
    one = {**groups_of(MTP, 2, {}), "precision": settings, "optim": {"moments": "fp32"}}
    expected = run_tasks.alone(run_tasks.run, tiny_run(root, **one), tmp_path / "alone")
    piped = {**groups, "precision": settings, "optim": {"moments": "fp32"}}
    found = joined(ranks(2).run(run_tasks.run, tiny_run(root, 2, **piped), tmp_path / "piped"))
    assert found["tensors"].keys() == expected["tensors"].keys()
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)
        for kind, modules in b["precision_health"].items():
            assert a["precision_health"][kind].keys() == modules.keys(), kind
    first, first_alone = found["records"][0]["precision_health"], expected["records"][0]["precision_health"]
    for module, health in first_alone["gradient"].items():
        assert first["gradient"][module]["amax"] == pytest.approx(health["amax"], rel=0.1), module
