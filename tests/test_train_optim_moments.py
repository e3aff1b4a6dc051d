"""Moments in BF16 and FP8: beside torch's AdamW in FP32, what is kept, and that keeping it loses nothing more."""

import math
from dataclasses import replace
from typing import Any

import pytest
import rank_tasks
import torch
from tiny_models import SMALL, tokens_of
from torch import nn

from octofold.backends.errors import ConfigError
from octofold.kernels.qtensor import QTensor
from octofold.train.build import build_engine, draft_model
from octofold.train.config import OptimConfig, RunConfig, validate
from octofold.train.engines.native import NativeEngine
from octofold.train.optim.moments import AdamW, CompactAdamW, moments_bytes
from octofold.train.precision.config import PrecisionConfig

CHOICES: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
OPTIM = OptimConfig(lr=0.01, schedule="constant", warmup_steps=0, clip_norm=0.05)
SHAPES = [(3, 130), (257,), (2, 5, 128)]


def gradients(steps: int) -> list[list[torch.Tensor]]:
    """For each step one for each shape: noise around a mean, of sizes that differ from row to row by powers of ten."""
    generator = torch.Generator().manual_seed(0)
    means = [torch.randn(shape, generator=generator) for shape in SHAPES]
    sizes = [10.0 ** torch.randint(-6, 1, (*shape[:-1], 1), generator=generator) for shape in SHAPES]
    return [
        [s * (m + torch.randn(m.shape, generator=generator)) for s, m in zip(sizes, means, strict=True)]
        for _ in range(steps)
    ]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def updates(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> list[torch.Tensor]:
    """What each step added to all weights, one vector a step."""
    found = []
    for grads in gradients(steps):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        found.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]))
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# A step rounds by up to 2^-9 (BF16) or 2^-4 (E4M3), evenly by 0.6 of that; of an error 0.9 or 0.95 is left a step
# later, so that errors of either sign add up to 2 to 3 steps' worth.
@pytest.mark.parametrize(("kind", "bound"), [("bf16", 3 * 2**-9), ("fp8", 1.5 * 2**-4)])
def test_updates_beside_torchs_adamw(kind, bound):
    ours, theirs = weights(), weights()
    found = updates(CompactAdamW(ours, kind=kind, **CHOICES), ours, 30)
    expected = updates(torch.optim.AdamW(theirs, **CHOICES), theirs, 30)
    assert torch.equal(found[0], expected[0]), "nothing has been rounded before the first update"
    distances = [distance(a, b) for a, b in zip(found[1:], expected[1:], strict=True)]
    assert 0 < max(distances) < bound
    assert max(distances[-10:]) < 1.7 * max(distances[:10]), "rounding does not pile up"


def test_fp32_moments_are_torchs_own():
    ours, theirs = weights(), weights()
    optimizer = AdamW(ours, **CHOICES)
    for parameter in ours:
        assert not any(moment.any() for moment in optimizer.moments(parameter).values())
    assert torch.equal(
        torch.stack(updates(optimizer, ours, 3)),
        torch.stack(updates(torch.optim.AdamW(theirs, **CHOICES), theirs, 3)),
    )


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_gradients_in_bf16(kind):
    """They are widened: the update is that of the same numbers in FP32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        parameters = weights()
        optimizer = CompactAdamW(parameters, kind=kind, **CHOICES)
        for grads in gradients(3):
            for parameter, gradient in zip(parameters, grads, strict=True):
                parameter.grad_dtype = dtype
                parameter.grad = gradient.to(torch.bfloat16).to(dtype)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "bytes_each"), [("bf16", 4.0), ("fp8", 3 + 1 / 128)])
def test_what_is_kept(kind, bytes_each):
    parameter = nn.Parameter(torch.zeros(128 * 8))
    optimizer = CompactAdamW([parameter], kind=kind, **CHOICES)
    ended: list[bool] = []
    optimizer.register_step_post_hook(lambda *_: ended.append(True))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert ended == [True]
    state = optimizer.state[parameter]
    first, second = state["exp_avg"], state["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    kept = (first.size_bytes if isinstance(first, QTensor) else first.nbytes) + second.nbytes
    assert kept == bytes_each * parameter.numel() == moments_bytes(parameter.numel(), kind, 4)
    torch.testing.assert_close(second.float(), 0.05 * parameter.grad.square(), rtol=2**-8, atol=0)
    shown = optimizer.moments(parameter)
    assert {name: moment.dtype for name, moment in shown.items()} == dict.fromkeys(shown, torch.bfloat16)
    error = (shown["exp_avg"].float() - 0.1 * parameter.grad).abs()
    assert (error / (0.1 * parameter.grad.abs().amax())).max() <= (2**-8 if kind == "bf16" else 2**-4)


def test_looking_at_fp8_moments_changes_nothing():
    """E4M3 times a power of two is exact in BF16, so a checkpoint that is written in between leaves no trace."""
    results = []
    for look in (False, True):
        parameters = weights()
        optimizer = CompactAdamW(parameters, kind="fp8", **CHOICES)
        for grads in gradients(5):
            for parameter, gradient in zip(parameters, grads, strict=True):
                if look:
                    optimizer.moments(parameter)
                parameter.grad = gradient.clone()
            optimizer.step()
            assert all(isinstance(optimizer.state[p]["exp_avg"], QTensor) for p in parameters)
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_moments_decay_when_gradients_cease(kind):
    """With the betas that are allowed no moment is rounded back to where it was."""
    parameter = nn.Parameter(torch.zeros(512))
    optimizer = CompactAdamW([parameter], kind=kind, **CHOICES)
    parameter.grad = torch.linspace(0.5, 1.0, 512)
    optimizer.step()
    before = {name: moment.clone() for name, moment in optimizer.moments(parameter).items()}
    parameter.grad = torch.zeros(512)
    optimizer.step()
    for name, moment in optimizer.moments(parameter).items():
        assert (moment < before[name]).all(), name


def advance(engine: NativeEngine, model: Any, steps: range) -> None:
    for step in steps:
        rank_tasks.backward(engine, model, tokens_of(SMALL, 4, 9, step), 4)
        engine.step()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_state_survives_tensors_and_restore(kind):
    optim = replace(OPTIM, moments=kind)
    first, second = (rank_tasks.build(SMALL, precision="bf16", seed=seed).model for seed in (0, 1))
    engine, resumed = build_engine(first, optim, 10), build_engine(second, optim, 10)
    advance(engine, first, range(3))
    saved, target = engine.tensors(), resumed.tensors()
    moments = {name for name in saved if name.startswith("optim.")}
    assert {saved[name].dtype for name in moments} == {torch.bfloat16}
    for name, tensor in target.items():
        tensor.copy_(saved[name])
    resumed.restore(engine.updates, engine.scaler.state_dict())
    advance(engine, first, range(3, 5))
    advance(resumed, second, range(3, 5))
    expected, found = rank_tasks.whole(engine.tensors().items()), rank_tasks.whole(resumed.tensors().items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(("kind", "bytes_each"), [("fp32", 8), ("bf16", 4), ("fp8", 3)])
def test_memory_is_counted_as_it_is_held(kind, bytes_each):
    config = RunConfig(model=SMALL, precision=PrecisionConfig("bf16"), optim=OptimConfig(moments=kind))
    drafted = draft_model(validate(config, 1), torch.device("cpu"), SMALL.vocab_size)
    sizes = [parameter.numel() for parameter in drafted.model.parameters()]
    scales = sum(math.ceil(size / 128) for size in sizes) if kind == "fp8" else 0
    assert drafted.need.state_bytes == sum(sizes) * (4 + 4 + bytes_each) + scales


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"moments": "fp16"}, "bf16", r"^optim\.moments=fp16\n"),
        ({"moments": "bf16"}, "fp64", r"^optim\.moments=bf16 precision\.name=fp64\n"),
        ({"moments": "bf16", "beta2": 0.999}, "bf16", r"^optim\.moments=bf16 optim\.beta2=0\.999\n"),
        ({"moments": "fp8", "beta1": 0.95}, "bf16", r"^optim\.moments=fp8 optim\.beta1=0\.95\n"),
    ],
)
def test_refused(changes, precision, message):
    config = replace(RunConfig(), optim=replace(OptimConfig(), **changes), precision=PrecisionConfig(precision))
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
