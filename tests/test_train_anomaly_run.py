"""Runs in which one rank's numbers go wrong: rank, module and samples are named, and the run does as it was told."""

from pathlib import Path
from typing import Any

import pytest
from anomaly_tasks import Fault, run_with_faults
from run_configs import tiny_run, write_corpus
from run_tasks import alone, run
from test_train_loss_scale_run import assert_same_tensors, curve, run_without

STEP = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("anomalies"))


def groups_of(micro: int, **parallel: Any) -> dict[str, Any]:
    return {"parallel": parallel, "train": {"micro_batch_size": micro}}


# The layout, sequences of a micro-batch, and a module on the last rank (of a pipeline, of its last stage).
LAYOUTS = [
    pytest.param(2, 2, {"expert": 2}, id="experts"),
    pytest.param(2, 2, {"pipeline": 2}, id="pipeline"),
    pytest.param(2, 4, {"tensor": 2}, id="tensor"),
]
SLOW = [
    pytest.param(2, 4, {"context": 2}, id="context"),
    pytest.param(2, 2, {"recompute": "full", "accumulate": "reduced"}, id="recompute"),
    pytest.param(4, 1, {"data_replicate": 2, "data_shard": 2, "expert": 2}, id="hybrid"),
    pytest.param(4, 2, {"tensor": 2, "context": 2, "expert": 4}, id="tensor, context, experts"),
    pytest.param(4, 1, {"pipeline": 2, "expert": 2, "pipeline_schedule": "interleaved"}, id="interleaved, experts"),
    pytest.param(4, 1, {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zbv"}, id="zbv, tensor"),
    pytest.param(4, 1, {"pipeline": 2, "expert": 2, "pipeline_schedule": "dualpipev"}, id="dualpipev, experts"),
]
SLOW = [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in SLOW]


def last_rank_with(module: str, ranks: int, parallel: dict[str, Any]) -> int:
    """Of a pipeline in a V, rank 0 holds the last layers."""
    first_stage = parallel.get("pipeline", 1) > 1 and parallel.get("pipeline_schedule") in ("zbv", "dualpipev")
    return ranks // 2 - 1 if first_stage and module.startswith(("layers.3", "lm_head")) else ranks - 1


@pytest.mark.parametrize(("kind", "direction"), [("output", "forward"), ("gradient", "backward")])
@pytest.mark.parametrize(("n", "micro", "parallel"), [*LAYOUTS, *SLOW])
def test_rank_layer_and_sample_are_named(n, micro, parallel, kind, direction, root, ranks, tmp_path):
    """One sequence of one micro-batch, in a module of the last layer of one rank."""
    module = "layers.3.self_attn.o_proj"
    rank = last_rank_with(module, n, parallel)
    fault = Fault(kind, module, rank, STEP, micro=1, row=micro - 1)
    found = ranks(n).run(run_with_faults, tiny_run(root, n, **groups_of(micro, **parallel)), tmp_path, [fault])
    (record,) = found[0]["anomalies"]
    sample = found[rank]["taken"][STEP][1][micro - 1]
    assert record["step"] == STEP
    assert (record["layer"], record["direction"]) == (module, direction)
    assert record["ranks"] == [rank]
    assert record["samples"] == [sample]
    assert record["origins"][0]["sample"] == sample
    assert (record["what"], record["cause"], record["action"]) == ("not_finite", "data or model", "skipped")
    warnings = [line for line in found[0]["printed"].splitlines() if line.startswith("warning:")]
    where = f"{module} ({direction}), on rank {rank}, sample {sample}; the update was skipped on every rank"
    assert len(warnings) == 1, "told once"
    assert warnings[0].endswith(f"first in {where}")
    assert [result["updates"] for result in found] == [2] * n
    assert [r["applied"] for r in found[0]["records"]] == [True, False, True]


def policy(on_anomaly: str, steps: int = 6, **more: Any) -> dict[str, Any]:
    """Checkpoints every two steps, and a schedule that does not know the end."""
    train = {"steps": steps, "on_anomaly": on_anomaly, "micro_batch_size": 4, **more}
    return {"parallel": {"expert": 2}, "train": train, "checkpoint": {"every_steps": 2, "keep": 0}} | {
        "optim": {"schedule": "constant", "warmup_steps": 2}
    }


def test_a_run_goes_back_past_the_batch(root, ranks, tmp_path):
    """And ends as one that never met it, bit for bit; so does a run that is resumed from between."""
    fault = Fault("output", "layers.1.mlp", 1, step=5, row=2, passes=2)
    config = tiny_run(root, 2, **policy("rollback"))
    found = ranks(2).run(run_with_faults, config, tmp_path / "back", [fault])
    (record,) = found[0]["anomalies"]
    assert (record["action"], record["to_step"], record["left_out"]) == ("rolled_back", 4, [32, 40])
    assert record["samples"] == [38], "of 36 to 39, which rank 1 reads"
    assert all(result["left_out"] == [(32, 40)] for result in found)
    assert "back to step_4, without samples 32 to 39" in found[0]["printed"]
    expected = ranks(2).run(run_without, config, tmp_path / "without", [5])[0]
    assert_same_tensors(found[0]["tensors"], expected["tensors"])
    assert [r["step"] for r in found[0]["records"]] == [1, 2, 3, 4, 5, 6]
    assert curve(found[0]["records"]) == curve(expected["records"])
    longer = policy("rollback", steps=8)
    resumed = tiny_run(root, 2, resume=str(tmp_path / "back"), **longer)
    going_on = ranks(2).run(run_with_faults, resumed, tmp_path / "back", [])[0]
    assert going_on["left_out"] == [(32, 40)]
    assert len(going_on["anomalies"]) == 1, "kept in the metrics"
    assert going_on["taken"][7] == [[56, 57, 58, 59]]


def test_going_back_is_bounded_and_says_what_happened(root, ranks, tmp_path):
    """Step 5 fails whatever batch it is given: each is left out, and then the run ends."""
    fault = Fault("output", "layers.1.mlp", 1, step=5)
    config = tiny_run(root, 2, **policy("rollback", max_anomalies=2))
    for found in ranks(2).run(run_with_faults, config, tmp_path, [fault]):
        assert found["error"].startswith("step 5: 3 anomalies within 100 steps")
        assert found["error"].count("layers.1.mlp (forward), on rank 1, sample") == 3
        assert found["left_out"] == [(32, 48)]
    assert [record["action"] for record in found["anomalies"]] == ["rolled_back", "rolled_back", "stopped"]


def test_a_run_told_to_stop_stops(root, ranks, tmp_path):
    fault = Fault("gradient", "layers.1.mlp", 0, step=3)
    for found in ranks(2).run(run_with_faults, tiny_run(root, 2, **policy("stop")), tmp_path, [fault]):
        assert found["error"].startswith("step 3: gradient norm is nan: first in layers.1.mlp (backward), on rank 0")
        assert "step_2" in found["error"], "the last checkpoint"
        assert [record["step"] for record in found["records"]] == [1, 2, 3]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(root, tmp_path):
    config = tiny_run(root, train={"on_anomaly": "rollback"})
    found = alone(run_with_faults, config, tmp_path, [Fault("output", "lm_head", 0, step=2)])
    assert found["anomalies"][0]["action"] == "skipped"
    assert "there is no checkpoint to go back to" in found["printed"]


def test_weights_that_break_are_found_where_they_lie(root, ranks, tmp_path):
    """All ranks compute with them; one holds them. Going back mends them, and nothing is left out."""
    fault = Fault("weight", "layers.2.self_attn.o_proj", 1, step=5)
    config = tiny_run(root, 2, **policy("rollback"))
    found = ranks(2).run(run_with_faults, config, tmp_path / "broken", [fault])
    (record,) = found[0]["anomalies"]
    assert (record["cause"], record["ranks"], record["layer"]) == ("weights", [1], "layers.2.self_attn.o_proj.weight")
    assert found[0]["left_out"] == []
    expected = ranks(2).run(run, config, tmp_path / "sound")[0]
    assert_same_tensors(found[0]["tensors"], expected["tensors"])


def test_a_token_whose_embedding_breaks_is_known_by_its_samples(root, tmp_path):
    """Not every sequence holds the letter."""
    row = ord("z")
    fault = Fault("weight", "embed_tokens", 0, step=3, row=row)
    config = tiny_run(root, data={"sequence_length": 16}, train={"global_batch_size": 16, "micro_batch_size": 8})
    found = alone(run_with_faults, config, tmp_path, [fault])
    record = found["anomalies"][0]
    assert (record["cause"], record["layer"]) == ("weights", "embed_tokens.weight")
    assert record["samples"] == found["holding"]
    assert 0 < len(record["samples"]) < 16


@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_what_a_second_pass_does_not_repeat_is_the_device(kind, root, ranks, tmp_path):
    fault = Fault(kind, "layers.1.self_attn", 1, step=2, passes=1)
    config = tiny_run(root, 2, **policy("rollback", steps=3))
    found = ranks(2).run(run_with_faults, config, tmp_path, [fault])[0]
    (record,) = found["anomalies"]
    assert record["cause"] == "device"
    assert record["samples"] == []
    # A gradient is summed over ranks before anything looks at it.
    assert record["ranks"] == ([1] if kind == "output" else [])
    assert "a device erred" in found["printed"]
    assert found["left_out"] == []


def test_a_spike_is_named_by_its_samples(root, tmp_path):
    """Thirty-four steps without an alarm, then one sequence of 8."""
    train = {"steps": 36, "spike_factor": 6.0, "micro_batch_size": 4}
    config = tiny_run(root, data={"sequence_length": 16}, model={"num_hidden_layers": 2}, train=train)
    fault = Fault("large", "lm_head", 0, step=35, micro=1, row=2)
    found = alone(run_with_faults, config, tmp_path, [fault])
    (record,) = found["anomalies"]
    assert (record["step"], record["what"], record["number"]) == (35, "spike", "loss")
    assert record["value"] > 2 * record["usual"]
    assert record["samples"] == [found["taken"][35][1][2]]
    assert record["layer"]
    assert record["cause"] == "data or weights"
    assert [r["applied"] for r in found["records"]] == [True] * 34 + [False, True]


def test_a_healthy_run_raises_no_alarm(root, tmp_path):
    """With a factor below the one that is advised, a rate at which such a model learns fast, and BF16."""
    train = {"steps": 70, "spike_factor": 6.0, "micro_batch_size": 8}
    groups = {"precision": {"name": "bf16"}, "optim": {"lr": 3e-3, "warmup_steps": 10}}
    shape = {"data": {"sequence_length": 32}, "model": {"num_hidden_layers": 2}}
    found = alone(run_with_faults, tiny_run(root, train=train, **groups, **shape), tmp_path, [])
    assert found["anomalies"] == []
    assert found["records"][-1]["loss"] < 0.5 * found["records"][0]["loss"]
