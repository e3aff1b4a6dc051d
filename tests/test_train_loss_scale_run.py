"""Runs under loss scaling: it changes nothing, survives overflow on any rank, and is the same after a restart."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
import torch
import torch.distributed as dist
from run_configs import tiny_run, write_corpus
from torch import nn

from octofold.backends.errors import UserError
from octofold.train.config import RunConfig
from octofold.train.models.config import BalanceConfig, MtpConfig
from octofold.train.precision.config import LossScaleConfig
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer

# So large that a balance loss that is not scaled, or not unscaled, shows.
BALANCED = {
    "num_hidden_layers": 2,
    "balance": BalanceConfig(sequence_loss=0.3, z_loss=0.1),
    "num_nextn_predict_layers": 1,
    # Nothing in these runs depends on how many steps are to come.
    "mtp": MtpConfig(late_from=1.0),
}
DYNAMIC = LossScaleConfig("dynamic", init=2.0**16, growth_interval=1000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("loss_scale"))


def spoil(trainer: Trainer, step: int, how: str) -> None:
    """On the last rank alone, at one step: logits become NaN (how="loss"), or their gradient infinite ("gradient")."""

    def hook(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if trainer.progress.step + 1 != step or dist.get_rank() != dist.get_world_size() - 1:
            return logits
        if how == "gradient":
            logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits
        return logits * float("nan")

    trainer.model.lm_head.register_forward_hook(hook)


def run_spoiled(config: RunConfig, run_dir: Path, step: int, how: str) -> dict[str, Any]:
    """`run_tasks.run` with one bad batch; also what rank 0 `printed`."""
    printed = io.StringIO()
    trainer = run_tasks.build(config, run_dir, printed)
    spoil(trainer, step, how)
    assert trainer.run(StopSignals())
    return {**run_tasks.outcome(trainer, run_dir), "printed": printed.getvalue()}


def run_without(config: RunConfig, run_dir: Path, left_out: list[int]) -> dict[str, Any]:
    """`run_tasks.run` on data without the batches of these steps, counted from 1: nothing ever computes with them."""
    trainer = run_tasks.build(config, run_dir)
    next_step, number = trainer.loader.next_step, 0

    def passing_over() -> Any:
        nonlocal number
        batches, number = next_step(), number + 1
        return passing_over() if number in left_out else batches

    trainer.loader.next_step = passing_over  # type: ignore[method-assign]
    assert trainer.run(StopSignals())
    return run_tasks.outcome(trainer, run_dir)


def assert_same_tensors(found: run_tasks.Arrays, expected: run_tasks.Arrays) -> None:
    assert found.keys() == expected.keys()
    assert any(name.startswith("optim.") for name in found)
    for name, tensor in expected.items():
        assert tensor.tobytes() == found[name].tobytes(), name


def curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What steps computed."""
    return [(r["loss"], r["grad_norm"], r["lr"], r["expert_load"]) for r in records]


@pytest.mark.parametrize(("n", "precision"), [(1, "fp64"), (2, "fp64"), (2, "fp32"), (1, "fp8_block")])
def test_a_scale_changes_no_bit(n, precision, root, ranks, tmp_path):
    """A power of two only moves exponents, in the backward pass too, as long as no number leaves the format's range,
    and what FP8 rounds, since the scales of its tiles are powers of two as well.

    With accumulation, clipping, multi-token prediction, balance losses and expert biases.
    """

    def run(name: str, loss_scale: LossScaleConfig) -> dict[str, Any]:
        groups: dict[str, Any] = {"parallel": {"expert": n}, "train": {"micro_batch_size": 2}, "model": BALANCED}
        groups["precision"] = {"name": precision, "arithmetic": "emulate", "block": 16, "loss_scale": loss_scale}
        return ranks(n).run(run_tasks.run_with_gradients, tiny_run(root, n, **groups), tmp_path / name)[0]

    plain, scaled = run("plain", LossScaleConfig()), run("scaled", LossScaleConfig("static", init=1024.0))
    assert_same_tensors(scaled["tensors"], plain["tensors"])
    assert curve(scaled["records"]) == curve(plain["records"])
    assert max(record["grad_norm"] for record in plain["records"]) > 1, "clipping takes part"
    assert {record["loss_scale"] for record in plain["records"]} == {1}
    assert {record["loss_scale"] for record in scaled["records"]} == {1024}
    gate = "layers.1.mlp.gate.weight"
    np.testing.assert_array_equal(scaled["gradients"][gate], 1024 * plain["gradients"][gate])


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_overflow_on_one_rank_of_four(how, root, ranks, tmp_path):
    """All skip, the scale halves, and the run goes on as one that never saw that batch, in every bit of FP64."""

    def config(steps: int) -> RunConfig:
        groups: dict[str, Any] = {"parallel": {"expert": 2}, "model": BALANCED, "optim": {"schedule": "constant"}}
        precision = {"loss_scale": DYNAMIC}
        return tiny_run(root, 4, train={"steps": steps, "micro_batch_size": 1}, precision=precision, **groups)

    everyone = ranks(4).run(run_spoiled, config(5), tmp_path / "spoiled", 2, how)
    assert [result["updates"] for result in everyone] == [4] * 4
    assert [result["progress"]["step"] for result in everyone] == [5] * 4
    found = everyone[0]
    records = found["records"]
    assert [record["applied"] for record in records] == [True, False, True, True, True]
    assert [record["loss_scale"] for record in records] == [2.0**16] * 2 + [2.0**15] * 3
    assert [record["overflows"] for record in records] == [0, 1, 1, 1, 1]
    assert np.isfinite(records[1]["loss"]) == (how == "gradient")
    warnings = [line for line in found["printed"].splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert warnings[0].endswith("the update was skipped on every rank; the loss scale is now 32768")
    expected = ranks(4).run(run_without, config(4), tmp_path / "without", [2])[0]
    assert_same_tensors(found["tensors"], expected["tensors"])
    assert curve([record for record in records if record["applied"]]) == curve(expected["records"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scale_that_is_far_too_large_finds_its_way(precision, root, ranks, tmp_path):
    """Gradients that really overflow FP32's range: a loss of large weight under the largest scale."""
    groups: dict[str, Any] = {"parallel": {"expert": 2}, "optim": {"schedule": "constant"}}
    groups["model"] = {"balance": BalanceConfig(z_loss=30.0)}

    def config(steps: int, **loss_scale: Any) -> RunConfig:
        scaling = {"name": precision, "loss_scale": LossScaleConfig(**loss_scale)}
        return tiny_run(root, 2, train={"steps": steps}, precision=scaling, **groups)

    dynamic = config(12, kind="dynamic", init=2.0**126, most=2.0**126)
    found = ranks(2).run(run_tasks.run, dynamic, tmp_path / "dynamic")[0]
    records = found["records"]
    skipped = [record["step"] for record in records if not record["applied"]]
    assert 3 <= len(skipped) <= 8
    assert skipped == list(range(1, len(skipped) + 1)), "once found, the scale works"
    assert all(np.isfinite(record["loss"]) for record in records), "only gradients overflow"
    assert [record["loss_scale"] for record in records[: len(skipped)]] == [2.0 ** (127 - step) for step in skipped]
    applied = records[len(skipped) :]
    assert {record["loss_scale"] for record in applied} == {2.0 ** (126 - len(skipped))}
    assert applied[-1]["loss"] < applied[0]["loss"]
    # And trains as without a scale, on the data that is left.
    plain = ranks(2).run(run_without, config(len(applied)), tmp_path / "plain", skipped)[0]
    for ours, theirs in zip(applied, plain["records"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def copy_of_run(source: Path, run_dir: Path, step: int) -> Path:
    """A run as it lies after a kill: its checkpoints end at `step`, its metrics go on."""
    shutil.copytree(source, run_dir)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return run_dir


@pytest.mark.parametrize(("n", "moments"), [(2, "bf16"), (1, "fp8")])
def test_a_restart_keeps_scale_counters_and_moments(n, moments, root, ranks, tmp_path):
    """Bit for bit, from a checkpoint in the middle of counting: an overflow borne, one update since."""
    scaling = LossScaleConfig("dynamic", init=1024.0, growth_interval=3, hysteresis=2)
    groups: dict[str, Any] = {
        "parallel": {"expert": n},
        "train": {"steps": 8},
        "checkpoint": {"every_steps": 4, "keep": 0},
        "optim": {"moments": moments},
        "precision": {"name": "bf16", "loss_scale": scaling},
    }
    whole = ranks(n).run(run_spoiled, tiny_run(root, n, **groups), tmp_path / "whole", 3, "gradient")[0]
    records = whole["records"]
    assert [record["loss_scale"] for record in records] == [1024] * 6 + [2048] * 2
    run_dir = copy_of_run(tmp_path / "whole", tmp_path / "resumed", step=4)
    resumed = ranks(n).run(run_tasks.run, tiny_run(root, n, resume=str(run_dir), **groups), run_dir)[0]
    # As text, since the norm of the skipped update is NaN.
    assert str(curve(resumed["records"])) == str(curve(records))
    for field in ("step", "loss_scale", "overflows", "applied"):
        assert [record[field] for record in resumed["records"]] == [record[field] for record in records]
    assert_same_tensors(resumed["tensors"], whole["tensors"])


@pytest.mark.parametrize("moments", ["bf16", "fp8"])
def test_moments_move_to_another_layout(moments, root, ranks, tmp_path):
    """Whole moments and weights are equal after loading; FP8 tiles are cut anew when the next update is kept."""
    groups: dict[str, Any] = {"precision": {"name": "bf16"}, "optim": {"moments": moments}}
    saved = run_tasks.alone(run_tasks.run, tiny_run(root, **groups), tmp_path)["tensors"]
    config = tiny_run(root, 2, parallel={"expert": 2}, resume=str(tmp_path), **groups)
    assert_same_tensors(ranks(2).run(run_tasks.initial_tensors, config, tmp_path / "two")[0], saved)
    config = tiny_run(root, 2, parallel={"expert": 2}, resume=str(tmp_path), train={"steps": 6}, **groups)
    moved = ranks(2).run(run_tasks.run, config, tmp_path / "moved")[0]["records"]
    stayed = run_tasks.alone(run_tasks.run, tiny_run(root, train={"steps": 6}, **groups), tmp_path / "stayed")
    for ours, theirs in zip(moved[-3:], stayed["records"][-3:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize(("saved", "now"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp8", "bf16"), ("fp32", "fp8")])
def test_moments_that_were_kept_otherwise_are_read(saved, now, root, tmp_path):
    def config(moments: str, **groups: Any) -> RunConfig:
        return tiny_run(root, precision={"name": "bf16"}, optim={"moments": moments}, **groups)

    kept = run_tasks.alone(run_tasks.run, config(saved), tmp_path)["tensors"]
    found = run_tasks.alone(run_tasks.initial_tensors, config(now, resume=str(tmp_path)), tmp_path / "now")
    for name, tensor in kept.items():
        if name.startswith("optim.") and now != "fp32":
            tensor = torch.from_numpy(tensor).bfloat16().float().numpy()
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("how", "last"),
    [
        # No scale cures a loss that is NaN: as many steps as without scaling.
        (lambda logits: logits * float("nan"), 13),
        # The loss is finite: 10 steps from 1024 to 1, then 13 at the least scale.
        (lambda logits: logits.register_hook(lambda gradient: gradient * float("inf")) and logits, 23),
    ],
    ids=["loss", "gradient"],
)
def test_a_run_that_only_skips_stops(how: Callable[[torch.Tensor], torch.Tensor], last, root, tmp_path):
    def error(config: RunConfig) -> str:
        trainer = run_tasks.build(config, tmp_path)
        trainer.model.lm_head.register_forward_hook(lambda module, inputs, logits: how(logits))
        with pytest.raises(UserError) as caught:
            trainer.run(StopSignals())
        trainer.loader.close()
        assert trainer.engine.scaler.scale == 1, "every skipped update halves it, down to the least scale"
        return str(caught.value)

    scaling = {"loss_scale": LossScaleConfig("dynamic", init=1024.0)}
    train = {"steps": 50, "max_anomalies": 12}
    message = run_tasks.alone(error, tiny_run(root, train=train, precision=scaling))
    assert message.startswith(f"step {last}: 13 anomalies within 100 steps")
    assert "first in lm_head" in message
