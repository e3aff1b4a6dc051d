"""Whole runs with balance losses and multi-token prediction: every layout computes what one rank computes, and what
changes in the course of a run changes at its time. FP64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus
from test_train_run import Layout, assert_equal_runs

from octofold.train.models.config import BalanceConfig, MtpConfig

V2 = {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "n_group": 4,
    "topk_group": 2,
    "balance": BalanceConfig(bias_update_rate=0.0, expert_loss=0.3, device_loss=0.5, communication_loss=0.2),
}
V3 = {
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "balance": BalanceConfig(bias_update_rate=0.01, sequence_loss=0.3, z_loss=0.1),
}
KINDS = {"v2": V2, "v3": V3}
FIELDS = {"v2": ["expert_loss", "device_loss", "communication_loss"], "v3": ["sequence_loss", "z_loss", "mtp_losses"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("runs"))


def groups_of(layout: Layout, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "parallel": {"expert": layout.expert},
        "train": {"micro_batch_size": layout.micro},
        "data": {"mask_documents": True},
    }


@pytest.fixture(scope="module")
def run_alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The run of a kind on one rank in one micro-batch, computed once; without balance losses, if asked."""
    done: dict[tuple[str, bool], dict[str, Any]] = {}

    def run(kind: str, with_losses: bool = True) -> dict[str, Any]:
        if (kind, with_losses) not in done:
            rate = KINDS[kind]["balance"].bias_update_rate
            model = KINDS[kind] if with_losses else KINDS[kind] | {"balance": BalanceConfig(bias_update_rate=rate)}
            config = tiny_run(root, **groups_of(Layout(1, 1, 8), model))
            folder = tmp_path_factory.mktemp("alone")
            done[kind, with_losses] = run_tasks.alone(run_tasks.run_with_gradients, config, folder)
        return done[kind, with_losses]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(2, 2, 2), Layout(2, 1, 4), Layout(4, 2, 1)], ids=str)
def test_layout_equals_one_rank(kind, layout, root, ranks, run_alone, tmp_path):
    """Losses, loads and norms of 3 steps, gradients of step 1, biases, moments and weights at the end."""
    expected = run_alone(kind)
    config = tiny_run(root, layout.ranks, **groups_of(layout, KINDS[kind]))
    found = ranks(layout.ranks).run(run_tasks.run_with_gradients, config, tmp_path)[0]
    assert_equal_runs(found, expected, 1e-9)
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert a["balance"] == b["balance"]
        for name in FIELDS[kind]:
            # Balance losses are summed in FP32 for the record; no gradient comes from those sums.
            assert a[name] == pytest.approx(b[name], rel=1e-9 if name == "mtp_losses" else 1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_balance_losses_reach_every_gate(kind, run_alone):
    found, without = run_alone(kind), run_alone(kind, with_losses=False)
    first, plain = found["records"][0], without["records"][0]
    assert first["loss"] == plain["loss"]
    assert first.keys() - plain.keys() == {name for name in FIELDS[kind] if name != "mtp_losses"}
    names = [name for name in found["gradients"] if name.endswith("mlp.gate.weight")]
    assert len(names) == (3 if kind == "v2" else 4)
    for name in names:
        assert abs(found["gradients"][name] - without["gradients"][name]).max() > 1e-6, name


def biases(outcome: dict[str, Any]) -> dict[str, list[float]]:
    return {name: t.tolist() for name, t in outcome["tensors"].items() if name.endswith("e_score_correction_bias")}


def test_biases_stand_still_after_their_share_of_the_updates(root, tmp_path):
    """Half of four updates move them; the gates' choices still change."""

    def run(until: float, stop_at: int | None = None) -> dict[str, Any]:
        model = V3 | {"balance": BalanceConfig(bias_update_rate=0.01, bias_update_until=until)}
        config = tiny_run(root, model=model, train={"steps": 4})
        return run_tasks.alone(run_tasks.run, config, tmp_path / f"{until}-{stop_at}", stop_at)

    at_half = biases(run(0.5, stop_at=2))
    assert len(at_half) == 4
    assert any(any(bias) for bias in at_half.values())
    assert biases(run(0.5)) == at_half
    assert biases(run(1.0)) != at_half
    assert biases(run(1.0, stop_at=2)) == at_half
    assert not any(any(bias) for bias in biases(run(0.0)).values())


def test_the_weight_of_further_tokens_changes_at_its_share_of_the_updates(root, tmp_path):
    """A run that goes from one weight to another equals one that was stopped and resumed with the other."""

    def config(weight: float, late_weight: float, resume: str | None = None) -> Any:
        mtp = MtpConfig(loss_weight=weight, late_loss_weight=late_weight, late_from=0.5)
        return tiny_run(root, model=V3 | {"mtp": mtp}, train={"steps": 4}, resume=resume)

    whole = run_tasks.alone(run_tasks.run, config(0.3, 0.1), tmp_path / "whole")
    constant = run_tasks.alone(run_tasks.run, config(0.3, 0.3), tmp_path / "constant")
    parts = tmp_path / "parts"
    run_tasks.alone(run_tasks.run, config(0.3, 0.3), parts, 2)
    resumed = run_tasks.alone(run_tasks.run, config(0.1, 0.1, str(parts)), parts)
    norms = {
        name: [record["grad_norm"] for record in outcome["records"]]
        for name, outcome in {"whole": whole, "constant": constant, "resumed": resumed}.items()
    }
    assert norms["whole"] == norms["resumed"]
    assert norms["whole"][:2] == norms["constant"][:2]
    assert norms["whole"][2] != norms["constant"][2], "update 3 of 4 is the first after half of them"
