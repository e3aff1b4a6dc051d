"""Whole runs of a tiny model: every layout computes what one rank computes, and a seed decides everything."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.train.main import Outcome, train
from octofold.train.metrics import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("runs"))


@dataclass(frozen=True)
class Layout:
    ranks: int
    expert: int
    micro: int

    def __str__(self) -> str:
        return f"{self.ranks}ranks-expert{self.expert}-micro{self.micro}"


def groups_of(layout: Layout, model: dict[str, Any], mask: bool, precision: str) -> dict[str, Any]:
    return {
        "model": model,
        "parallel": {"expert": layout.expert},
        "train": {"micro_batch_size": layout.micro},
        "data": {"mask_documents": mask},
        "precision": {"name": precision},
    }


def largest_difference(found: run_tasks.Arrays, expected: run_tasks.Arrays) -> tuple[float, str]:
    """The largest |a - b| / max |b| over tensors, and the tensor's name."""
    assert found.keys() == expected.keys()
    differences = {}
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        differences[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    worst = max(differences, key=differences.__getitem__)
    return differences[worst], worst


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert len(found["records"]) == len(expected["records"])
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] == b["tokens"]
        assert a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance)
        assert a["expert_load"] == b["expert_load"]
    for part in found.keys() & {"gradients", "tensors"}:
        difference, name = largest_difference(found[part], expected[part])
        assert difference < tolerance, f"{part}: {name} differs by {difference:.1e}"


# Widths that no number of ranks divides: every dense parameter is split unevenly.
UNEVEN = {"vocab_size": 257, "intermediate_size": 193, "kv_lora_rank": 31}
CASES = [
    pytest.param(Layout(2, 2, 4), {}, False, id="two ranks split the experts"),
    pytest.param(Layout(2, 1, 4), {}, False, id="two ranks of data only"),
    pytest.param(Layout(1, 1, 4), {}, False, id="one rank accumulates over 2 micro-batches"),
    pytest.param(Layout(2, 2, 1), {}, False, id="two ranks accumulate over 4 micro-batches"),
    pytest.param(Layout(4, 2, 2), {}, True, id="four ranks, 2 x 2 over the experts, documents masked"),
    pytest.param(Layout(4, 2, 1), UNEVEN, True, id="four ranks, uneven shards"),
    pytest.param(Layout(4, 2, 2), {"n_routed_experts": 6}, False, id="four ranks, three experts over two shards"),
]


@pytest.fixture(scope="module")
def run_alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The same run on one rank in one micro-batch, computed once."""
    done: dict[str, dict[str, Any]] = {}

    def run(model: dict[str, Any], mask: bool, precision: str) -> dict[str, Any]:
        key = f"{model} {mask} {precision}"
        if key not in done:
            config = tiny_run(root, **groups_of(Layout(1, 1, 8), model, mask, precision))
            done[key] = run_tasks.alone(run_tasks.run_with_gradients, config, tmp_path_factory.mktemp("alone"))
        return done[key]

    return run


@pytest.mark.parametrize(("layout", "model", "mask"), CASES)
def test_layout_equals_one_rank(layout, model, mask, root, ranks, run_alone, tmp_path):
    """Losses, whole gradients of step 1, norms, loads, moments, biases and weights after 3 steps, in FP64."""
    expected = run_alone(model, mask, "fp64")
    config = tiny_run(root, layout.ranks, **groups_of(layout, model, mask, "fp64"))
    found = ranks(layout.ranks).run(run_tasks.run_with_gradients, config, tmp_path)[0]
    assert len(expected["gradients"]) > 40
    assert expected["tensors"]["model.layers.1.mlp.gate.e_score_correction_bias"].any()
    assert_equal_runs(found, expected, 1e-9)


def test_layout_in_bf16(root, ranks, run_alone, tmp_path):
    """A smoke test: BF16 keeps 8 bits, so a router near a tie may choose otherwise; the loss stays within 1%."""
    expected = run_alone({}, False, "bf16")
    config = tiny_run(root, 2, **groups_of(Layout(2, 2, 4), {}, False, "bf16"))
    found = ranks(2).run(run_tasks.run_with_gradients, config, tmp_path)[0]
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)
    for name, gradient in expected["gradients"].items():
        assert found["gradients"][name].dtype == np.float32
        error = np.linalg.norm(found["gradients"][name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.15, name


def curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a run computed at each step, without how long it took."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"], r["expert_load"]) for r in records]


@pytest.mark.parametrize(("n", "precision"), [(1, "bf16"), (2, "bf16")])
def test_a_seed_decides_every_bit(n, precision, root, ranks, tmp_path):
    def outcome(name: str, seed: int) -> dict[str, Any]:
        groups = {"precision": {"name": precision}, "parallel": {"expert": n}, "train": {"seed": seed}}
        return ranks(n).run(run_tasks.run, tiny_run(root, n, **groups), tmp_path / name)[0]

    first, second, other = outcome("first", 0), outcome("second", 0), outcome("other", 1)
    assert curve(first["records"]) == curve(second["records"])
    for name, tensor in first["tensors"].items():
        assert tensor.tobytes() == second["tensors"][name].tobytes(), name
    assert [r["loss"] for r in other["records"]] != [r["loss"] for r in first["records"]]
    assert any(tensor.tobytes() != other["tensors"][name].tobytes() for name, tensor in first["tensors"].items())


def test_nan_on_one_rank_skips_the_update_on_all(root, ranks, tmp_path):
    groups: dict[str, Any] = {"parallel": {"expert": 2}, "optim": {"warmup_steps": 8}}
    config = tiny_run(root, 2, train={"steps": 5, "micro_batch_size": 1}, **groups)
    found = ranks(2).run(run_tasks.run_with_nan, config, tmp_path, 2)
    assert [result["progress"]["step"] for result in found] == [5, 5]
    assert [result["updates"] for result in found] == [4, 4]
    records = found[0]["records"]
    assert [record["applied"] for record in records] == [True, False, True, True, True]
    assert not np.isfinite(records[1]["loss"])
    assert not np.isfinite(records[1]["grad_norm"])
    # The schedule counts applied updates, so the skipped one's rate is used again.
    assert records[2]["lr"] == records[1]["lr"] != records[3]["lr"]
    assert all(np.isfinite(record["loss"]) for record in records if record["applied"])
    assert all(np.isfinite(tensor).all() for tensor in found[0]["tensors"].values())
    warnings = [line for line in found[0]["printed"].splitlines() if line.startswith("warning:")]
    resumed = tiny_run(root, 2, train={"steps": 6}, resume=str(tmp_path), **groups)
    assert ranks(2).run(run_tasks.run, resumed, tmp_path)[0]["updates"] == 5
    where = "first in lm_head (forward), on rank 1, samples 9, 11, 13, 15"
    assert warnings == [f"warning: step 2: gradient norm is nan: {where}; the update was skipped on every rank"]


def test_skipped_update_leaves_everything_as_it_was(root, ranks, tmp_path):
    config = tiny_run(root, 2, parallel={"expert": 2}, train={"steps": 1})
    before = ranks(2).run(run_tasks.initial_tensors, config, tmp_path / "before")[0]
    after = ranks(2).run(run_tasks.run_with_nan, config, tmp_path / "after", 1)[0]
    for name, tensor in before.items():
        assert tensor.tobytes() == after["tensors"][name].tobytes(), name


@pytest.mark.parametrize("mask", [False, True])
def test_validation_does_not_depend_on_ranks(mask, root, ranks, tmp_path):
    """14 sequences: four ranks of two have too many places, and repeated samples must not count."""
    groups: dict[str, Any] = {"data": {"mask_documents": mask}, "train": {"eval_sequences": 14, "micro_batch_size": 2}}
    expected = run_tasks.alone(run_tasks.validate, tiny_run(root, **groups), tmp_path / "1")["record"]
    assert (expected["tokens"] < 14 * 64) if mask else (expected["tokens"] == 14 * 64)
    for n in (2, 4):
        config = tiny_run(root, n, parallel={"expert": 2}, **groups)
        for found in ranks(n).run(run_tasks.validate, config, tmp_path / str(n)):
            assert found["record"]["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            assert found["record"]["tokens"] == expected["tokens"]
            assert found["training"]
            assert found["loads"] == {5}


def copy_of_run(source: Path, run_dir: Path, step: int) -> Path:
    """A run as it lies after a kill: its checkpoints end at `step`, its metrics go on."""
    shutil.copytree(source, run_dir)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return run_dir


@pytest.mark.parametrize(("n", "precision"), [(1, "bf16"), (2, "bf16")])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(n, precision, root, ranks, tmp_path):
    groups: dict[str, Any] = {
        "precision": {"name": precision},
        "parallel": {"expert": n},
        "train": {"steps": 20},
        "checkpoint": {"every_steps": 10},
    }
    whole = ranks(n).run(run_tasks.run, tiny_run(root, n, **groups), tmp_path / "whole")[0]
    run_dir = copy_of_run(tmp_path / "whole", tmp_path / "resumed", step=10)
    resumed = ranks(n).run(run_tasks.run, tiny_run(root, n, resume=str(run_dir), **groups), run_dir)[0]
    assert curve(resumed["records"]) == curve(whole["records"])
    assert [record["step"] for record in resumed["records"]] == list(range(1, 21))
    assert resumed["progress"] == whole["progress"]
    assert resumed["updates"] == whole["updates"] == 20
    for name, tensor in whole["tensors"].items():
        assert tensor.tobytes() == resumed["tensors"][name].tobytes(), name


@pytest.mark.slow
def test_run_continues_on_other_layouts(root, ranks, tmp_path):
    """One rank, then two with split experts, then 2 x 2, then one again: one curve, in FP64."""

    def config(n: int, expert: int, **more: Any) -> Any:
        groups: dict[str, Any] = {"train": {"steps": 12}, "parallel": {"expert": expert}, **more}
        return tiny_run(root, n, **groups)

    expected = ranks(2).run(run_tasks.run, config(2, 2), tmp_path / "whole")[0]
    run_dir = tmp_path / "moved"
    run_tasks.alone(run_tasks.run, config(1, 1), run_dir, 3)
    ranks(2).run(run_tasks.run, config(2, 2, resume=str(run_dir)), run_dir, 6)
    ranks(4).run(run_tasks.run, config(4, 2, resume=str(run_dir)), run_dir, 9)
    found = run_tasks.alone(run_tasks.run, config(1, 1, resume=str(run_dir)), run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_12", "step_6", "step_9"]
    assert_equal_runs(found, expected, 1e-9)


def test_steps_can_be_raised(root, tmp_path):
    """With a schedule that does not know the end, the longer run is the one that was asked for at once."""

    def go(steps: int, run_dir: Path, resume: str | None = None) -> Outcome:
        groups: dict[str, Any] = {"train": {"steps": steps}, "optim": {"schedule": "constant"}, "resume": resume}
        return train(tiny_run(root, **groups), run_dir)

    go(8, tmp_path / "whole")
    go(5, tmp_path / "raised")
    assert go(8, tmp_path / "raised", str(tmp_path / "raised")) == Outcome(8)
    whole, raised = (read_metrics(tmp_path / name) for name in ("whole", "raised"))
    assert curve([r for r in raised if r["kind"] == "train"]) == curve([r for r in whole if r["kind"] == "train"])
    before = (tmp_path / "raised" / "metrics.jsonl").read_text()
    assert go(8, tmp_path / "raised", str(tmp_path / "raised")) == Outcome(8)
    assert (tmp_path / "raised" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("n", [1, 2])
def test_tied_head_is_saved_once_and_resumed(n, root, ranks, tmp_path):
    groups: dict[str, Any] = {"model": {"tie_word_embeddings": True}, "parallel": {"expert": n}}
    straight = ranks(n).run(run_tasks.run, tiny_run(root, n, train={"steps": 4}, **groups), tmp_path / "a")[0]
    assert "model.lm_head.weight" not in straight["tensors"]
    assert "model.embed_tokens.weight" in straight["tensors"]
    ranks(n).run(run_tasks.run, tiny_run(root, n, train={"steps": 4}, **groups), tmp_path / "b", 2)
    resumed = tiny_run(root, n, train={"steps": 4}, resume=str(tmp_path / "b"), **groups)
    again = ranks(n).run(run_tasks.run, resumed, tmp_path / "b")[0]
    for name, tensor in straight["tensors"].items():
        assert tensor.tobytes() == again["tensors"][name].tobytes(), name


def test_a_run_that_only_skips_stops_on_every_rank(root, ranks, tmp_path):
    config = tiny_run(root, 2, parallel={"expert": 2}, train={"steps": 50, "max_anomalies": 2})
    for message in ranks(2).run(run_tasks.error_with_broken_model, config, tmp_path):
        assert message.startswith("step 3: 3 anomalies within 100 steps; the last of them:\n    step 1: gradient norm")
        assert "first in lm_head (forward), on ranks 0, 1" in message
        assert "at most train.max_anomalies=2 " in message
