"""The errors of FP8 products: a faultless run is never accused, a planted fault always, by module and product."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty_kernels
import pytest
import torch
from run_configs import tiny_run, write_corpus
from run_tasks import alone, build

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor
from octofold.kernels.recipe import Recipe, block_recipe, tensor_recipe
from octofold.kernels.registry import Workload, choose
from octofold.train.config import RunConfig
from octofold.train.precision.apply import fp8_states
from octofold.train.precision.probe import (
    ERROR_MARGIN,
    MOST_FAULT,
    MOST_SATURATED,
    Accusation,
    Probe,
    accusations,
    watch,
)
from octofold.train.stop import StopSignals

PRODUCTS = ["forward", "input_gradient", "weight_gradient"]
SMALL: dict[str, Any] = {"num_hidden_layers": 2}
RECIPES: list[dict[str, Any]] = [
    {"name": "fp8_block", "block": 16},
    {"name": "fp8_block", "block": 128},
    {"name": "fp8_block", "block": 16, "scale_fmt": "float"},
    {"name": "fp8_block", "block": 16, "scale_fmt": "float", "saved": "bf16", "gradient_fmt": "e5m2"},
    {"name": "fp8_tensor_current"},
    {"name": "fp8_tensor_current", "scale_fmt": "float"},
    {"name": "fp8_tensor_delayed"},
    {"name": "mxfp8"},
]


def probed(config: RunConfig, run_dir: Path, steps: int = 1) -> dict[str, Probe]:
    """The probes of a run after its first steps."""
    trainer = build(config, run_dir)
    probes = watch(fp8_states(trainer.model))
    with trainer.console.progress(steps, 0) as bar:
        for _ in range(steps):
            trainer.step(StopSignals(), bar)
    trainer.loader.close()
    return {name: probe for name, probe in probes.items() if probe.products or probe.saturated}


def fp8_run(root: Path, precision: dict[str, Any], **groups: Any) -> RunConfig:
    return tiny_run(root, model=SMALL, precision={"arithmetic": "emulate", "watch_every": 0, **precision}, **groups)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("probe"))


@pytest.mark.parametrize("precision", RECIPES, ids=lambda recipe: " ".join(map(str, recipe.values())))
def test_a_faultless_run_is_not_accused(precision, corpus, tmp_path):
    """Every layer and product is seen, with the error that its formats let expect; scales of past steps too."""
    probes = alone(probed, fp8_run(corpus, precision), tmp_path, 3)
    assert {"layers.0.self_attn.o_proj", "layers.1.mlp.experts.down_proj"} <= probes.keys()
    assert accusations(probes) == []
    for name, probe in probes.items():
        assert list(probe.products) == PRODUCTS, name
        assert set(probe.saturated) == {"activation", "weight", "gradient"}, name
        for kind in ("forward", "input_gradient"):
            product = probe.products[kind]
            # Gradients grow in these first steps, beyond what scales of past steps can hold.
            most = 3.0 if probe.state.recipe.delayed else 1.3
            assert 0.7 * product.expected < product.error < most * product.expected, (name, kind)
        assert max(product.fault for product in probe.products.values()) > 1e-4  # rounding to BF16 shows


def test_twenty_seeds_without_a_fault_are_not_accused(corpus, tmp_path):
    accused = {}
    for seed in range(20):
        config = fp8_run(corpus, {"name": "fp8_block", "block": 16}, train={"seed": seed})
        accused[seed] = accusations(alone(probed, config, tmp_path / str(seed)))
    assert accused == {seed: [] for seed in range(20)}


@pytest.mark.parametrize("scale_fmt", ["ue8m0", "float"])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("fault", ["rounded_down", "saturating", "unscaled", "neighbours_scale"])
def test_a_planted_fault_is_found(fault, block, scale_fmt, corpus, tmp_path):
    precision = {"name": "fp8_block", "block": block, "scale_fmt": scale_fmt, "gradient_fmt": "e5m2"}
    config = fp8_run(corpus, precision, kernels={"quantize": f"faulty_kernels:{fault}"})
    probes = alone(probed, config, tmp_path)
    found = accusations(probes)
    faulty = {accusation.module for accusation in found if accusation.what.endswith("gradient: fault")}
    assert faulty == probes.keys(), "every module's gradients are touched"
    # Far beyond the thresholds, not by chance.
    assert found[0].found > 10 * found[0].threshold
    if fault in ("rounded_down", "saturating"):
        assert {one.what for one in found} >= {"gradient: saturated", "activation: saturated", "forward: fault"}
    if fault == "neighbours_scale":
        assert not any(one.what.startswith(("forward", "activation", "weight:")) for one in found)


def test_products_that_are_kept_in_fp8_only_have_no_error(corpus, tmp_path):
    config = tiny_run(corpus, model=SMALL, precision={"name": "fp8_block", "arithmetic": "storage", "watch_every": 0})
    probes = alone(probed, config, tmp_path)
    assert probes
    assert all(not probe.products and list(probe.saturated) == ["activation"] for probe in probes.values())


def state_of(recipe: Recipe) -> Fp8State:
    workload = Workload("cpu", torch.bfloat16, formats=recipe.formats, emulated=True)
    kernels, _ = choose(KernelsConfig(), workload)
    return Fp8State(recipe, kernels, keep_weights=False)


RECIPE = block_recipe("fp8_block", 16, "ue8m0", E4M3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_groups_may_be_empty():
    state = state_of(RECIPE)
    probes = watch({"experts": state})
    x, weight = random(24, 32).requires_grad_(), random(3, 48, 32, seed=1).requires_grad_()
    state.grouped(x, weight, torch.tensor([10, 0, 14])).backward(random(24, 48, seed=2))
    assert list(probes["experts"].products) == PRODUCTS
    assert accusations(probes) == []


def test_no_rows_at_all():
    state = state_of(RECIPE)
    probes = watch({"experts": state})
    x, weight = random(0, 32).requires_grad_(), random(2, 48, 32).requires_grad_()
    state.grouped(x, weight, torch.tensor([0, 0])).backward(random(0, 48))
    assert accusations(probes) == []


def test_terms_that_cancel_are_no_fault():
    """The sum of gradients over rows is nearly zero, its rounding errors are not."""
    state = state_of(RECIPE)
    probes = watch({"linear": state})
    x, grad = random(64, 32), random(64, 32, seed=1)
    x, grad = torch.cat([x, x]).requires_grad_(), torch.cat([grad, -1.01 * grad])
    state.linear(x, random(32, 32, seed=2).requires_grad_()).backward(grad)
    assert accusations(probes) == []
    exact = grad.double().T @ x.detach().double()
    terms = (grad.double().square().sum(1) * x.detach().double().square().sum(1)).sum().sqrt()
    assert exact.norm() < 0.1 * terms


def test_a_product_that_is_wrong_or_not_finite_is_accused():
    probe = Probe(state_of(RECIPE))
    a, b = random(32, 32), random(16, 32, seed=1)
    probe.product("forward", a, b, a @ b.T * 1.2, None, "rows")
    probes = {"layers.0.self_attn.o_proj": probe}
    assert [one.what for one in accusations(probes)] == ["forward: fault", "forward: error"]
    assert str(accusations(probes)[0]).startswith("layers.0.self_attn.o_proj forward: fault 20.")
    # NaN is worse than any number, whichever comes first.
    probe.product("forward", a, b, a @ b.T * torch.nan, None, "rows")
    probe.product("forward", a, b, a @ b.T, None, "rows")
    assert all(one.found != one.found for one in accusations(probes))
    assert len(accusations(probes)) == 2


def test_scales_of_past_steps_are_not_blamed_for_saturation():
    """But a provider that takes other scales than it is given is."""
    state = state_of(tensor_recipe("fp8_tensor_delayed", "ue8m0", E4M3, delayed=True))
    past = torch.full_like(state.amax_history_KH, 0.5)
    state.amax_history_KH.copy_(past)
    probes = watch({"linear": state})
    x, weight = random(32, 32).requires_grad_(), random(16, 32, seed=1).requires_grad_()
    state.linear(x, weight).backward(random(32, 16, seed=2))
    assert min(probes["linear"].saturated.values()) > 0.1
    assert accusations(probes) == []
    state.kernels = replace(state.kernels, quantize=faulty_kernels.saturating)
    state.linear(x, weight).backward(random(32, 16, seed=2))
    assert {one.what for one in accusations(probes)} == {f"{kind}: fault" for kind in PRODUCTS}


def test_thresholds_are_where_they_are_said_to_be():
    probe = Probe(state_of(RECIPE))
    probe.saturated = {"weight": MOST_SATURATED, "gradient": 2 * MOST_SATURATED}
    assert accusations({"m": probe}) == [Accusation("m", "gradient: saturated", 2 * MOST_SATURATED, MOST_SATURATED)]
    assert max(MOST_FAULT.values()) < 0.0346 < ERROR_MARGIN * 0.0346


@pytest.mark.parametrize(("dtype", "last"), [(E4M3, 464.0), (E5M2, 61440.0)])
def test_saturated_is_what_lies_beyond_the_last_number_that_rounds_to_the_largest(dtype, last):
    probe = Probe(state_of(RECIPE))
    format = Format((1, 0), "float", dtype)
    x = torch.tensor([[last, -last, last * 1.01, -last * 1.5, 1.0, 0.0, 2.0, 3.0]]) * 8
    quantized = QTensor(torch.zeros(x.shape).to(dtype), torch.tensor([[8.0]]), format)
    probe.tensor("gradient", x, quantized)
    assert probe.saturated == {"gradient": 2 / 8}
    probe.tensor("gradient", x * 0, quantized)
    assert probe.saturated == {"gradient": 2 / 8}, "the worst is kept"
