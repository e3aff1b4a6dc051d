"""The errors of FP8 products: a faultless run is never accused, a planted fault always, by module and product."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty_kernels
import pytest
import torch
import torch.nn.functional as F
from run_configs import tiny_run, write_corpus
from run_tasks import alone, build

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor
from octofold.kernels.recipe import Recipe, block_recipe, tensor_recipe
from octofold.kernels.registry import Workload, choose
from octofold.train.config import RunConfig
from octofold.train.precision.apply import fp8_states
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.policy import recipe_for
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
    {"name": "fp8_block", "block": 16, "gradient_fmt": "e5m2"},
    {"name": "fp8_block", "block": 16, "saved": "bf16"},
]


def named(recipe: dict[str, Any]) -> str:
    """For the names of tests."""
    return " ".join(map(str, recipe.values()))


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


@pytest.mark.parametrize("precision", RECIPES, ids=named)
def test_a_faultless_run_is_not_accused(precision, corpus, tmp_path):
    """Every layer and product is seen, with the error that its formats let expect; scales of past steps too."""
    probes = alone(probed, fp8_run(corpus, precision), tmp_path, 3)
    assert {"layers.0.self_attn.o_proj", "layers.1.mlp.experts.down_proj"} <= probes.keys()
    assert accusations(probes) == []
    for name, probe in probes.items():
        assert list(probe.products) == PRODUCTS, name
        assert set(probe.saturated) == {"activation", "weight", "gradient"}, name
        for kind, product in probe.products.items():
            # Gradients grow in these first steps, beyond what scales of past steps can hold.
            most = 3.0 if probe.state.recipe.delayed else 1.3
            # The sum of tokens' gradients grows beyond what its rounding errors add up to.
            least = 0.1 if kind == "weight_gradient" else 0.7
            assert least * product.expected < product.error < most * product.expected, (name, kind)
        assert max(product.fault for product in probe.products.values()) > 1e-4  # rounding to BF16 shows


def accused_of_twenty_seeds(precision: dict[str, Any], corpus: Path, run_dir: Path) -> dict[int, list[Accusation]]:
    accused = {}
    for seed in range(20):
        config = fp8_run(corpus, precision, train={"seed": seed})
        accused[seed] = accusations(alone(probed, config, run_dir / str(seed)))
    return accused


def test_twenty_seeds_without_a_fault_are_not_accused(corpus, tmp_path):
    accused = accused_of_twenty_seeds({"name": "fp8_block", "block": 16}, corpus, tmp_path)
    assert accused == {seed: [] for seed in range(20)}


@pytest.mark.matrix
@pytest.mark.parametrize("precision", [one for one in RECIPES if "delayed" not in one["name"]], ids=named)
def test_twenty_seeds_of_any_recipe_are_not_accused(precision, corpus, tmp_path):
    accused = accused_of_twenty_seeds(precision, corpus, tmp_path)
    assert accused == {seed: [] for seed in range(20)}


def probed_with(op: str, fault: str, precision: dict[str, Any], corpus: Path, run_dir: Path) -> dict[str, Probe]:
    """The probes of one batch with a planted fault."""
    config = fp8_run(corpus, precision, kernels={op: f"faulty_kernels:{fault}"})
    return alone(probed, config, run_dir)


QUANTIZER_FAULTS = [
    *((fault, gradient) for gradient in ("e4m3", "e5m2") for fault in ("rounded_down", "saturating", "unscaled")),
    ("neighbours_scale", "e5m2"),
]


@pytest.mark.parametrize("scale_fmt", ["ue8m0", "float"])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("fault", "gradient_fmt"), QUANTIZER_FAULTS)
def test_a_planted_fault_is_found(fault, gradient_fmt, block, scale_fmt, corpus, tmp_path):
    precision = {"name": "fp8_block", "block": block, "scale_fmt": scale_fmt, "gradient_fmt": gradient_fmt}
    probes = probed_with("quantize", fault, precision, corpus, tmp_path)
    found = accusations(probes)
    faulty = {accusation.module for accusation in found if accusation.what.endswith("gradient: fault")}
    assert faulty == probes.keys(), "every module's gradients are touched"
    # Far beyond the thresholds, not by chance.
    assert found[0].found > 10 * found[0].threshold
    if fault in ("rounded_down", "saturating"):
        assert {one.what for one in found} >= {"gradient: saturated", "activation: saturated", "forward: fault"}
    if fault == "neighbours_scale":
        assert not any(one.what.startswith(("forward", "activation", "weight:")) for one in found)


PLANTED = [
    ("dequantize", "kept_halved", "all", {"weight_gradient"}),
    ("dequantize", "kept_as_zeros", "all", {"weight_gradient"}),
    ("swiglu_quantize", "up_for_gate", "down", {"forward"}),
    ("swiglu_quantize", "unscaled_swiglu", "down", {"forward"}),
    ("quantize_groups", "next_groups_rows", "experts", {"weight_gradient"}),
    ("quantize_groups", "last_row_lost", "experts", {"weight_gradient"}),
    ("scaled_mm", "larger", "dense", set(PRODUCTS)),
    ("scaled_grouped_mm", "larger_grouped", "experts", {"forward", "input_gradient"}),
    ("scaled_grouped_mm", "next_groups_matrix", "experts", {"forward", "input_gradient"}),
    ("scaled_grouped_inner_mm", "larger_inner", "experts", {"weight_gradient"}),
    ("scaled_grouped_inner_mm", "next_groups_gradient", "experts", {"weight_gradient"}),
    ("scaled_grouped_inner_mm", "one_group_left_out", "experts", {"weight_gradient"}),
]
"""Op, fault, the modules whose products it spoils, and which of them."""
MIXED_UP_SCALES = [
    ("quantize", "turned_neighbours_scale", "dense", {"weight_gradient"}),
    ("dequantize", "kept_with_neighbours_scale", "all", {"weight_gradient"}),
    ("quantize_groups", "groups_neighbours_scale", "experts", {"weight_gradient"}),
]
"""Alike, for recipes of many scales a tensor."""
BLOCKS, FLOAT_BLOCKS, TENSOR, MX = RECIPES[0], RECIPES[2], RECIPES[4], RECIPES[7]
SLOW = [pytest.mark.slow]
PLANTED_IN = [
    *((BLOCKS, *planted) for planted in PLANTED + MIXED_UP_SCALES),
    *(pytest.param(FLOAT_BLOCKS, *planted, marks=SLOW) for planted in PLANTED + MIXED_UP_SCALES),
    *(pytest.param(recipe, *planted, marks=SLOW) for recipe in (TENSOR, MX) for planted in PLANTED),
]


@pytest.mark.parametrize(("precision", "op", "fault", "where", "kinds"), PLANTED_IN)
def test_a_fault_in_any_op_is_found_where_it_is(precision, op, fault, where, kinds, corpus, tmp_path):
    """In one batch, in every module and product that it spoils and in no other."""
    probes = probed_with(op, fault, precision, corpus, tmp_path)
    spoiled = {
        "all": probes.keys(),
        "dense": {name for name in probes if ".experts." not in name},
        "experts": {name for name in probes if ".experts." in name},
        "down": {name for name in probes if name.endswith("down_proj")},
    }[where]
    if fault == "kept_as_zeros":
        # A SwiGLU of zeros passes no gradient on, so that nothing is multiplied before it.
        spoiled = {name for name in spoiled if "weight_gradient" in probes[name].products}
        assert {"layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"} <= spoiled
    found = {(one.module, one.what) for one in accusations(probes) if one.what.endswith("fault")}
    assert found == {(name, f"{kind}: fault") for name in spoiled for kind in kinds}


def test_products_that_are_kept_in_fp8_only_have_no_error(corpus, tmp_path):
    config = tiny_run(corpus, model=SMALL, precision={"name": "fp8_block", "arithmetic": "storage", "watch_every": 0})
    probes = alone(probed, config, tmp_path)
    assert probes
    assert all(not probe.products and list(probe.saturated) == ["activation"] for probe in probes.values())


def state_of(recipe: Recipe) -> Fp8State:
    workload = Workload("cpu", torch.bfloat16, formats=recipe.formats)
    kernels, _ = choose(KernelsConfig(), workload)
    return Fp8State(recipe, kernels, keep_weights=False)


RECIPE = block_recipe("fp8_block", 16, "ue8m0", E4M3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("counts", [None, [100, 0, 28, 128]], ids=["dense", "grouped"])
@pytest.mark.parametrize("behind_swiglu", [False, True], ids=["plain", "behind_swiglu"])
@pytest.mark.parametrize("precision", [one for one in RECIPES if "delayed" not in one["name"]], ids=named)
def test_errors_are_what_formats_let_expect(precision, behind_swiglu, counts):
    """Of all three products, where neither terms nor errors go together."""
    recipe = recipe_for(PrecisionConfig(arithmetic="emulate", **precision), "linear")
    assert recipe is not None
    state = state_of(recipe)
    probes = watch({"linear": state})
    x = random(256, 192 if behind_swiglu else 96).requires_grad_()
    weight = random(*([] if counts is None else [len(counts)]), 64, 96, seed=1).requires_grad_()
    if counts is None:
        out = (state.swiglu_linear if behind_swiglu else state.linear)(x, weight)
    else:
        out = (state.swiglu_grouped if behind_swiglu else state.grouped)(x, weight, torch.tensor(counts))
    out.backward(random(256, 64, seed=2))
    products = probes["linear"].products
    assert list(products) == PRODUCTS
    ratios = {kind: product.error / product.expected for kind, product in products.items()}
    assert all(0.7 < ratio < 1.3 for ratio in ratios.values()), ratios
    assert accusations(probes) == []
    # What the probe calls the truth is the gradient that nothing was rounded for.
    assert weight.grad is not None
    active = x.detach().double()
    if behind_swiglu:
        gate, up = active.chunk(2, dim=-1)
        active = F.silu(gate) * up
    grad = random(256, 64, seed=2).double()
    if counts is None:
        exact = grad.T @ active
    else:
        parts = zip(grad.split(counts), active.split(counts), strict=True)
        exact = torch.stack([of_group.T @ rows for of_group, rows in parts])
    missed = (weight.grad.double() - exact).norm() / exact.norm()
    assert products["weight_gradient"].error == pytest.approx(float(missed), rel=0.1)


def test_nothing_where_there_should_be_something_is_a_fault():
    probe = Probe(state_of(RECIPE))
    a, b = random(32, 32), random(16, 32, seed=1)
    probe.product("forward", a, b, torch.zeros(32, 16), None, "rows")
    assert [(one.what, round(one.found)) for one in accusations({"m": probe})] == [
        ("forward: fault", 1),
        ("forward: error", 1),
    ]


def test_something_where_there_should_be_nothing_is_a_fault():
    """Operands that meet nowhere have a product of zeros."""
    probe = Probe(state_of(RECIPE))
    a, b = random(32, 32), random(16, 32, seed=1)
    a[:, :16], b[:, 16:] = 0, 0
    probe.product("forward", a, b, torch.zeros(32, 16), None, "rows")
    assert probe.products["forward"].fault == probe.products["forward"].error == 0
    probe.product("forward", torch.zeros_like(a), b, torch.zeros(32, 16), None, "rows")
    assert accusations({"m": probe}) == []
    probe.product("forward", torch.zeros_like(a), b, torch.full((32, 16), 1e-30), None, "rows")
    assert [one.found for one in accusations({"m": probe})] == [float("inf")] * 2


def test_a_fault_in_a_small_group_is_not_lost_among_large_ones():
    probe = Probe(state_of(RECIPE))
    counts = torch.tensor([4, 1000])
    a, b = random(1004, 16), random(2, 16, 16, seed=1)
    a[:4] /= 1024
    right = torch.cat([a[:4] @ b[0].T, a[4:] @ b[1].T])
    probe.product("forward", a, b, torch.cat([1.1 * right[:4], right[4:]]), counts, "rows")
    assert probe.products["forward"].fault > 0.05
    assert probe.products["forward"].error < ERROR_MARGIN * probe.products["forward"].expected


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
