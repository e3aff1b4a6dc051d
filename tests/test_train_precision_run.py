"""Whole runs in FP8 on real ranks: every recipe trains as BF16 does, resumes bit for bit, and sends what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
import torch
from run_configs import TINY, tiny_run, write_corpus

from octofold.train.closing import validate
from octofold.train.config import RunConfig
from octofold.train.precision.config import FP8, LossScaleConfig, OverrideConfig

EMULATED = {"name": "fp8_block", "arithmetic": "emulate", "block": 16, "watch_every": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def fp8_run(root: Path, ranks: int = 1, **changes: Any) -> RunConfig:
    """A tiny run in emulated FP8; `changes` of the precision group, and of others as `tiny_run` has them."""
    groups = {name: changes.pop(name) for name in ("train", "parallel", "model", "resume") if name in changes}
    block = {"block": 128} if changes.get("name") == "mxfp8" else {}  # whose tiles are what they are
    return tiny_run(root, ranks, precision={**EMULATED, **block, **changes}, **groups)


def losses(outcome: dict[str, Any]) -> np.ndarray:
    return np.array([record["loss"] for record in outcome["records"]])


@pytest.fixture(scope="module")
def in_bf16(corpus: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    config = tiny_run(corpus, 2, precision={"name": "bf16"}, train={"steps": 12}, parallel={"expert": 2})
    return losses(ranks(2).run(run_tasks.run, config, tmp_path_factory.mktemp("bf16"))[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": FP8[0]},
        *(pytest.param({"name": name}, marks=pytest.mark.slow) for name in FP8[1:]),
        pytest.param({"scale_fmt": "float", "gradient_fmt": "e5m2", "saved": "bf16"}, marks=pytest.mark.slow),
        {"arithmetic": "storage"},
        {
            "name": "bf16",
            "overrides": [OverrideConfig("lm_head", name="fp8_block"), OverrideConfig("*.experts.*", name="mxfp8")],
        },
        pytest.param(
            {
                "overrides": [
                    OverrideConfig("embed_tokens", name="fp8_block"),
                    OverrideConfig("lm_head", name="fp8_block"),
                ]
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_recipe_follows_bf16(corpus, ranks, tmp_path, in_bf16, changes):
    """Two ranks that share the experts; a few steps from the same weights on the same batches stay within 1%."""
    config = fp8_run(corpus, 2, train={"steps": 12}, parallel={"expert": 2}, **changes)
    outcome = ranks(2).run(run_tasks.run, config, tmp_path)[0]
    found = losses(outcome)
    assert not np.array_equal(found, in_bf16)
    assert np.abs(found / in_bf16 - 1).max() < 0.01
    health = [record["precision_health"] for record in outcome["records"] if "precision_health" in record]
    assert len(health) == 6, "sampled every second step"
    kinds = {kind for kind, of_modules in health[-1].items() if of_modules}
    assert kinds == ({"activation"} if changes.get("arithmetic") == "storage" else {"activation", "weight", "gradient"})


def test_kept_weights_change_nothing(corpus, ranks, tmp_path):
    """Over two micro-batches a step and an evaluation between steps."""
    outcomes = []
    for keep in (True, False):
        train = {"steps": 4, "micro_batch_size": 2, "eval_every": 2}
        config = fp8_run(corpus, 2, keep_weights=keep, watch_every=0, train=train, parallel={"expert": 2})
        outcomes.append(ranks(2).run(run_tasks.run, config, tmp_path / str(keep))[0])
    kept, fresh = outcomes
    assert np.array_equal(losses(kept), losses(fresh))
    for name, tensor in kept["tensors"].items():
        assert np.array_equal(tensor, fresh["tensors"][name]), name


@pytest.mark.parametrize("name", ["fp8_block", "fp8_tensor_delayed"])
def test_resume_is_bit_for_bit(corpus, ranks, tmp_path, name):
    """Delayed scaling goes on with its history, which the checkpoint holds."""
    config = fp8_run(corpus, 2, name=name, amax_history=3, train={"steps": 6}, parallel={"expert": 2})
    whole = ranks(2).run(run_tasks.run, config, tmp_path / "whole")[0]
    ranks(2).run(run_tasks.run, config, tmp_path / "halves", 3)
    again = replace(config, resume=str(tmp_path / "halves"))
    resumed = ranks(2).run(run_tasks.run, again, tmp_path / "halves")[0]
    assert np.array_equal(losses(whole), losses(resumed))
    assert whole["tensors"].keys() == resumed["tensors"].keys()
    for tensor, values in whole["tensors"].items():
        assert np.array_equal(values, resumed["tensors"][tensor]), tensor
    histories = [values for tensor, values in whole["tensors"].items() if "amax_history" in tensor]
    assert len(histories) == (0 if name == "fp8_block" else 34)
    assert all((history > 0).all() for history in histories), "three steps of three kinds"


def test_a_run_may_go_on_under_another_recipe(corpus, ranks, tmp_path):
    """Delayed scaling begins its history where the checkpoint has none, and leaves one behind that nobody wants."""
    delayed = fp8_run(corpus, 1, name="fp8_tensor_delayed", amax_history=2, train={"steps": 2})
    run_tasks.alone(run_tasks.run, delayed, tmp_path)
    for name in ("fp8_block", "fp8_tensor_delayed"):
        step = 4 if name == "fp8_block" else 6
        config = fp8_run(corpus, 1, name=name, amax_history=2, train={"steps": step}, resume=str(tmp_path))
        outcome = run_tasks.alone(run_tasks.run, config, tmp_path)
        assert outcome["progress"]["step"] == step
    histories = [values for tensor, values in outcome["tensors"].items() if "amax_history" in tensor]
    assert all((history > 0).all() for history in histories)


@pytest.mark.slow
def test_delayed_scales_do_not_depend_on_who_looks(corpus, tmp_path):
    """Evaluation, watching, a skipped step and a resume leave the course of a run alone, under a growing loss scale."""
    scale = LossScaleConfig("dynamic", init=1024.0, growth_interval=2)
    runs = {}
    for name, looks in (("plain", {}), ("watched", {"watch_every": 3}), ("evaluated", {"eval_every": 2})):
        train = {"steps": 6, **({"eval_every": 2} if "eval_every" in looks else {})}
        delayed = {"name": "fp8_tensor_delayed", "amax_history": 2, "scale_fmt": "float", "loss_scale": scale}
        config = fp8_run(corpus, 1, **delayed, watch_every=looks.get("watch_every", 0), train=train)
        runs[name] = run_tasks.alone(run_tasks.run_with_nan, config, tmp_path / name, 3)
    halved = fp8_run(corpus, 1, **delayed, watch_every=3, train={"steps": 6, "eval_every": 2})
    run_tasks.alone(run_tasks.run_with_nan, replace(halved, train=replace(halved.train, steps=4)), tmp_path / "half", 3)
    again = replace(halved, resume=str(tmp_path / "half"))
    runs["resumed"] = run_tasks.alone(run_tasks.run, again, tmp_path / "half")
    for name, outcome in runs.items():
        for tensor, values in runs["plain"]["tensors"].items():
            assert np.array_equal(values, outcome["tensors"][tensor]), f"{name}: {tensor}"
    histories = [values for tensor, values in runs["plain"]["tensors"].items() if "amax_history" in tensor]
    assert all((history > 0).all() for history in histories)


def test_histories_are_those_of_all_ranks(corpus, ranks, tmp_path):
    """Each of two ranks sees half of the batch, and both end with the largest magnitudes of all of it."""
    config = {"name": "fp8_tensor_delayed", "amax_history": 2, "train": {"steps": 1}}
    one = run_tasks.alone(run_tasks.run, fp8_run(corpus, 1, **config), tmp_path / "one")
    two = ranks(2).run(run_tasks.run, fp8_run(corpus, 2, **config), tmp_path / "two")[0]
    for name in (name for name in one["tensors"] if "amax_history" in name):
        assert np.allclose(one["tensors"][name], two["tensors"][name], rtol=0.1), name


def test_bytes_to_experts_are_counted_and_halved(corpus, ranks, tmp_path):
    """E4M3 and a scale a tile, where BF16 has two bytes; what comes back is BF16. An evaluation does not count."""
    train = {"steps": 2, "eval_every": 1}
    sent = {}
    for dispatch in ("bf16", "fp8"):
        config = fp8_run(corpus, 2, dispatch=dispatch, train=train, parallel={"expert": 2})
        records = ranks(2).run(run_tasks.run, config, tmp_path / dispatch)[0]["records"]
        sent[dispatch] = records[0]["sent_bytes"]
    width = TINY.hidden_size
    rows = {purpose: sent["bf16"][purpose] / (2 * width) for purpose in sent["bf16"]}
    copies = 8 * 64 * TINY.num_experts_per_tok * 3  # of each token for each of its experts, in three layers
    assert set(rows.values()) == {rows["dispatch"]}, "what goes there comes back, and so do gradients"
    assert 0 < rows["dispatch"] < copies
    for purpose, count in rows.items():
        there = purpose in ("dispatch", "combine_gradient")
        # Weights and so routes agree in the first step.
        assert sent["fp8"][purpose] == count * (width + width // 16 if there else 2 * width), purpose
    alone = run_tasks.alone(run_tasks.run, fp8_run(corpus, 1, train={"steps": 1}), tmp_path / "alone")
    assert "sent_bytes" not in alone["records"][0]


def test_a_nan_batch_is_skipped_and_leaves_no_trace_in_histories(corpus, ranks, tmp_path):
    config = fp8_run(corpus, 2, name="fp8_tensor_delayed", train={"steps": 4}, parallel={"expert": 2})
    outcome = ranks(2).run(run_tasks.run_with_nan, config, tmp_path, 2)[0]
    assert [record["applied"] for record in outcome["records"]] == [True, False, True, True]
    assert all(np.isfinite(tensor).all() for tensor in outcome["tensors"].values())


def test_generation_and_evaluation_leave_training_alone(corpus, tmp_path):
    """The kept weights are those of the last update, whoever asked for them first."""
    config = fp8_run(corpus, 1, train={"steps": 3})

    def run(evaluate: bool) -> np.ndarray:
        trainer = run_tasks.build(config, tmp_path / str(evaluate))
        found = []
        for _ in range(3):
            if evaluate:
                validate(trainer, 2)
            batches = trainer.loader.next_step()
            tokens_J = torch.tensor([float(sum((b.labels_BS >= 0).sum() for b in batches))])
            found.append(float(trainer._accumulate(batches, tokens_J, trainer._schedule())[0]))
            trainer.engine.step()
        trainer.loader.close()
        return np.array(found)

    assert np.array_equal(run_tasks.alone(run, True), run_tasks.alone(run, False))
