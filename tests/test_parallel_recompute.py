"""Recompute: the same bits from less memory, nothing counted twice, on every layout."""

from dataclasses import replace
from typing import Any

import pytest
import recompute_tasks
import torch
from tiny_models import SMALL
from torch.utils.checkpoint import checkpoint

from octofold.kernels.recompute import Recomputing, is_recomputing, recomputed
from octofold.parallel.config import ParallelConfig
from octofold.train.config import PrecisionConfig
from octofold.train.models.config import BalanceConfig

# Attention, experts, shared experts, balance losses and multi-token prediction of DeepSeek-V3; widths of whole tiles.
MODEL = replace(
    SMALL,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    v_head_dim=16,
    n_shared_experts=1,
    num_nextn_predict_layers=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    balance=BalanceConfig(sequence_loss=1e-2),
)
MODES = ["none", "swiglu", "selective", "full"]
FP64 = PrecisionConfig("fp64")


def in_modes(started: Any, parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, dict[str, Any]]:
    """What rank 0 found under each way to recompute."""
    return {
        mode: started.run(recompute_tasks.step, MODEL, replace(parallel, recompute=mode), precision, 2)[0]
        for mode in MODES
    }


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == expected["loss"]
    for part in ("gradients", "amax"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items())
    assert torch.equal(found["loads"], expected["loads"]), "a load is counted in the forward pass only"
    assert torch.equal(found["balance"], expected["balance"])
    assert found["seen"] == expected["seen"], "an observer sees everything once"


@pytest.mark.parametrize(
    ("n", "parallel"),
    [
        pytest.param(1, ParallelConfig(), id="one rank"),
        pytest.param(2, ParallelConfig(expert=2), id="split experts"),
        pytest.param(2, ParallelConfig(expert=2, expert_capacity=0.5), id="experts with places"),
        pytest.param(2, ParallelConfig(tensor=2), id="split tensors"),
        pytest.param(2, ParallelConfig(context=2), id="split sequences"),
    ],
)
def test_gradients_are_equal_bit_for_bit(ranks, n, parallel):
    found = in_modes(ranks(n), parallel, FP64)
    assert any(gradient.any() for gradient in found["none"]["gradients"].values())
    for mode in MODES[1:]:
        assert_same_bits(found[mode], found["none"])
    live = [found[mode]["live"] for mode in MODES]
    assert live == sorted(live, reverse=True), "each way keeps less than the one before"
    assert len(set(live)) == len(MODES)
    # Whole blocks send their tokens again; nothing else sends more than without recompute.
    traffic = {mode: found[mode]["traffic"] for mode in MODES}
    assert traffic["none"] == traffic["swiglu"] == traffic["selective"]
    twice = ("dispatch", "combine", "network_dispatch", "network_combine")
    assert traffic["full"] == {name: count * (2 if name in twice else 1) for name, count in traffic["none"].items()}


@pytest.mark.parametrize(
    "name", ["bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8_block", "fp8_tensor_delayed"))]
)
def test_gradients_are_equal_bit_for_bit_in_low_precision(ranks, name):
    precision = PrecisionConfig(name, block=16) if name == "fp8_block" else PrecisionConfig(name)
    found = in_modes(ranks(2), ParallelConfig(expert=2), precision)
    for mode in MODES[1:]:
        assert_same_bits(found[mode], found["none"])
    assert found["full"]["live"] < found["selective"]["live"] < found["none"]["live"]
    # FP8 layers behind a SwiGLU keep its input in any case.
    assert (found["swiglu"]["live"] < found["none"]["live"]) == (name == "bf16")


def test_what_is_kept_of_a_marked_function_is_its_input():
    """Of the outputs, and of views of them; a function of a marked function's output leads back to the first input."""
    runs: list[tuple[str, bool]] = []

    def double(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        runs.append(("double", is_recomputing()))
        return 2 * x, -2 * x

    def shift(x: torch.Tensor) -> torch.Tensor:
        runs.append(("shift", is_recomputing()))
        return x + 1

    x = torch.arange(1.0, 7.0).requires_grad_()

    def loss(scope: Recomputing | None) -> torch.Tensor:
        if scope is not None:
            with scope:
                return loss(None)
        a, b = recomputed("norm", double, x)
        c = recomputed("norm", shift, a)
        # The product keeps a view of one output, the square keeps the other.
        return (a.view(2, 3)[:, 1:] * c.view(2, 3)[:, :2]).sum() + b.square().sum()

    loss(None).backward()
    expected, x.grad, runs[:] = x.grad, None, []
    kept = loss(Recomputing(frozenset({"norm"})))
    assert runs == [("double", False), ("shift", False)]
    kept.backward()
    assert torch.equal(x.grad, expected)
    assert all(again for _, again in runs[2:])
    assert {name for name, _ in runs[2:]} == {"double", "shift"}
    runs.clear()
    x.grad = None
    loss(Recomputing(frozenset({"swiglu"}))).backward()
    assert [again for _, again in runs] == [False, False], "of another kind: kept"
    assert torch.equal(x.grad, expected)


def test_an_output_that_was_changed_is_kept():
    x = torch.ones(4, requires_grad=True)
    with Recomputing(frozenset({"norm"})):
        y = recomputed("norm", lambda x: 2 * x, x)
        y.add_(1)
        z = (y * y).sum()
    z.backward()
    assert torch.equal(x.grad, torch.full((4,), 12.0))


def test_a_graph_may_be_differentiated_twice():
    """As the split backward pass of zero-bubble schedules does."""
    x = torch.arange(3.0, requires_grad=True)
    with Recomputing(frozenset({"norm"})):
        y = recomputed("norm", torch.sin, x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    assert torch.allclose(first, 2 * x.detach().sin() * x.detach().cos())


def test_marked_functions_inside_torchs_checkpoint():
    """Whole blocks run again without a scope of their own."""
    x = torch.arange(3.0, requires_grad=True)
    y = checkpoint(lambda x: recomputed("norm", torch.exp, x).square().sum(), x, use_reentrant=False)
    y.backward()
    assert torch.allclose(x.grad, 2 * (2 * x.detach()).exp())
