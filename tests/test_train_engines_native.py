"""The native engine: clipping, skipped updates, accumulation, and a state that survives a checkpoint's way."""

from dataclasses import replace
from typing import Any

import pytest
import rank_tasks
import torch
from tiny_models import SMALL, decoder, labels_of, positions_of, tokens_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from octofold.train.build import build_engine
from octofold.train.config import OptimConfig
from octofold.train.engines.native import NativeEngine, StepResult
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.optim.adamw import build_adamw
from octofold.train.optim.moments import AdamW
from octofold.train.precision.config import LossScaleConfig
from octofold.train.precision.loss_scale import LossScaler

OPTIM = OptimConfig(lr=0.01, schedule="constant", warmup_steps=0, clip_norm=0.05)
MODEL = replace(SMALL, n_routed_experts=6)


def plain_steps(optim: OptimConfig, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training by torch alone: norms before clipping, and the weights at the end."""
    model = decoder(MODEL)
    optimizer = build_adamw(model, optim)
    norms = []
    for step in range(steps):
        tokens_BS = tokens_of(MODEL, 4, 9, step)
        labels_BS = labels_of(tokens_BS)
        loss = summed_cross_entropy(model(tokens_BS, positions_of(tokens_BS)), labels_BS) / valid_tokens(labels_BS)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_close_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], weight, rtol=0, atol=tolerance)


# Accumulated micro-batches, split experts and clipping at once, against one big batch on a plain module.
@pytest.mark.parametrize(("n", "expert", "micro"), [(1, 1, 4), (1, 1, 1), (2, 2, 1), (4, 2, 1)])
@pytest.mark.parametrize("clip_norm", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_steps_equal_torchs_own(ranks, n, expert, micro, clip_norm):
    optim = replace(OPTIM, clip_norm=clip_norm)
    norms, weights = plain_steps(optim, 3)
    assert all(norm > 0.05 for norm in norms), "the bound binds"
    for found in ranks(n).run(rank_tasks.train_steps, MODEL, optim, expert, micro, [{}, {}, {}]):
        # torch divides by (norm + 1e-6), which scales gradients of norm about 1 by a millionth.
        assert [result.grad_norm for result in found["results"]] == pytest.approx(norms, rel=1e-4)
        assert_close_weights(found["weights"][-1], weights, 1e-5 if clip_norm else 1e-9)
        assert found["updates"] == 3
        assert found["cleared"]


@pytest.mark.usefixtures("world_of_one")
def test_gradients_are_clipped_to_the_bound():
    built = rank_tasks.build(MODEL)
    engine = build_engine(built.model, OPTIM, 10)
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad.to_local() for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item())

    engine.optimizer.register_step_pre_hook(note)
    rank_tasks.backward(engine, built.model, tokens_of(MODEL, 4, 9), 4)
    result = engine.step()
    assert result.grad_norm > OPTIM.clip_norm
    assert seen == [pytest.approx(OPTIM.clip_norm, rel=1e-12)]
    rank_tasks.backward(engine, built.model, tokens_of(MODEL, 4, 9), 4, factor=1e-4)
    small = engine.step()
    assert seen[1] == pytest.approx(small.grad_norm, rel=1e-12), "below the bound nothing is changed"
    assert small.grad_norm < OPTIM.clip_norm


def sharded_linear(dtype: torch.dtype) -> torch.nn.Module:
    """A layer of 8 x 8 whose gradients come in `dtype`, as they would from a policy that sums them so."""
    layer = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("clip_norm", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(dtype, clip_norm):
    outcomes = []
    for config in (LossScaleConfig(), LossScaleConfig("static", init=2.0**20)):
        layer = sharded_linear(dtype)
        optimizer = AdamW(layer.parameters(), lr=0.01, fused=True)
        scaler = LossScaler(config)
        engine = NativeEngine(layer, optimizer, scaler, clip_norm=clip_norm, learning_rate=lambda update: 0.01)
        results = []
        for step in range(3):
            for micro in range(2):
                generator = torch.Generator().manual_seed(2 * step + micro)
                loss = layer(torch.randn(4, 8, dtype=dtype, generator=generator)).float().square().mean()
                engine.backward(loss, last=micro == 1)
            assert {p.grad.dtype for p in layer.parameters()} == {dtype}
            results.append(engine.step())
        outcomes.append((results, rank_tasks.whole(layer.named_parameters())["weight"]))
    (plain, weight), (scaled, scaled_weight) = outcomes
    assert torch.equal(weight, scaled_weight)
    assert [result.loss_scale for result in scaled] == [2.0**20] * 3
    assert [replace(result, loss_scale=1.0) for result in scaled] == plain
    assert all(result.grad_norm > 0.05 for result in plain), "the bound binds"


@pytest.mark.usefixtures("world_of_one")
def test_an_overflow_shrinks_the_scale_and_updates_are_counted():
    model = rank_tasks.build(MODEL).model
    scaling = LossScaleConfig("dynamic", init=8.0, growth_interval=2)
    engine = build_engine(model, OPTIM, 10, scaling)
    results = []
    for step, factor in enumerate([1.0, float("inf"), 1.0, 1.0, 1.0]):
        rank_tasks.backward(engine, model, tokens_of(MODEL, 4, 9, step), 2, factor)
        results.append(engine.step())
    assert [result.loss_scale for result in results] == [8, 8, 4, 4, 8]
    assert [result.applied for result in results] == [True, False, True, True, True]
    assert (engine.updates, engine.scaler.overflows) == (4, 1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(("n", "expert"), [(1, 1), (2, 1), (2, 2)])
def test_a_gradient_that_is_not_finite_skips_the_update_everywhere(ranks, n, expert, factor):
    optim = replace(OPTIM, schedule="cosine", warmup_steps=4)
    spoiled = {n - 1: factor}
    for found in ranks(n).run(rank_tasks.train_steps, MODEL, optim, expert, 1, [{}, spoiled, {}]):
        results: list[StepResult] = found["results"]
        assert [result.applied for result in results] == [True, False, True]
        assert not torch.isfinite(torch.tensor(results[1].grad_norm))
        assert results[1].lr == results[2].lr == 2 * results[0].lr, "the schedule counts applied updates"
        assert found["updates"] == 2
        assert found["cleared"]
        _, first, second, third = found["weights"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert all(tensor.isfinite().all() for tensor in third.values())


@pytest.mark.usefixtures("world_of_one")
def test_state_survives_tensors_and_restore():
    optim = replace(OPTIM, schedule="cosine", warmup_steps=3)

    def advance(engine: NativeEngine, model: Any, step: int) -> StepResult:
        rank_tasks.backward(engine, model, tokens_of(MODEL, 4, 9, step), 4)
        return engine.step()

    first, second = (rank_tasks.build(MODEL, seed=seed).model for seed in (0, 1))
    engine, resumed = build_engine(first, optim, 10), build_engine(second, optim, 10)
    for step in range(2):
        advance(engine, first, step)
    with torch.no_grad():
        first.gates()[1].e_score_correction_bias.fill_(0.01)
    saved = engine.tensors()
    assert {name.partition(".")[0] for name in saved} == {"model", "optim"}
    assert {"model.layers.1.mlp.gate.e_score_correction_bias", "optim.lm_head.weight.exp_avg_sq"} <= saved.keys()
    target = resumed.tensors()
    assert target.keys() == saved.keys()
    assert not any(t.any() for name, t in rank_tasks.whole(target.items()).items() if name.startswith("optim."))
    for name, tensor in target.items():
        tensor.copy_(saved[name])
    resumed.restore(engine.updates, engine.scaler.state_dict())
    for step in range(2, 4):
        assert advance(engine, first, step) == advance(resumed, second, step)
    after, expected = resumed.tensors(), engine.tensors()
    for name, tensor in rank_tasks.whole(expected.items()).items():
        assert torch.equal(rank_tasks.whole([(name, after[name])])[name], tensor), name


@pytest.mark.usefixtures("world_of_one")
def test_asking_for_tensors_before_the_first_step_changes_nothing():
    outcomes = []
    for ask in (False, True):
        model = rank_tasks.build(MODEL).model
        engine = build_engine(model, OPTIM, 10)
        if ask:
            engine.tensors()
        rank_tasks.backward(engine, model, tokens_of(MODEL, 4, 9), 4)
        engine.step()
        outcomes.append(rank_tasks.whole(engine.tensors().items()))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
