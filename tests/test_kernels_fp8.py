"""FP8 linear layers: the three products against FP64 of what the recipe quantises, what is kept, and delayed scaling.

Tolerance: the operands are dequantised and multiplied in FP64; a BF16 result is rounded once, 2^-9 relative at most and
1.7e-3 in the Frobenius norm. With FP32 scales the `cpu` provider rounds both operands to BF16 as well.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.kernels.config import KernelsConfig
from octofold.kernels.fp8 import Fp8State
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor
from octofold.kernels.recipe import Recipe, block_recipe, mx_recipe, tensor_recipe
from octofold.kernels.reference.quantize import quantize
from octofold.kernels.registry import FP8_OPS, Kernels, Workload, choose

pytestmark = pytest.mark.usefixtures("poisoned")

RECIPES = {
    "block": block_recipe("fp8_block", 128, "ue8m0", E4M3),
    "block16-e5m2": block_recipe("fp8_block", 16, "ue8m0", E5M2),
    "block-float": block_recipe("fp8_block", 128, "float", E4M3),
    "block-bf16-saved": block_recipe("fp8_block", 32, "ue8m0", E4M3, saves_fp8=False),
    "mx": mx_recipe("mxfp8", E4M3),
    "tensor": tensor_recipe("fp8_tensor_current", "ue8m0", E4M3),
    "tensor-float": tensor_recipe("fp8_tensor_current", "float", E4M3),
}
PROVIDERS = ["auto", "reference"]


def kernels(provider: str = "auto", recipe: Recipe = RECIPES["block"]) -> Kernels:
    names = dict.fromkeys(FP8_OPS, provider)
    workload = Workload("cpu", torch.bfloat16, formats=recipe.formats, accumulation=recipe.accumulation)
    return choose(KernelsConfig(**names), workload)[0]


def state_of(recipe: Recipe, provider: str = "auto", **options: Any) -> Fp8State:
    state = Fp8State(recipe, kernels(provider, recipe), **{"keep_weights": True, **options})
    for buffer in state.buffers():
        buffer.zero_()
    return state


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(x: torch.Tensor, format: Format) -> torch.Tensor:
    """x as the specification quantises it, FP64."""
    return quantize(x, format).dequantize(torch.float64)


def inner(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Rows of one group as the weight gradient wants them: quantised along the rows."""
    return exact(x.t(), format).t()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def expected(
    recipe: Recipe, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, *, behind_swiglu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, gradient of x, gradient of w of one dense layer, in FP64 from quantised operands."""
    active = swiglu(x.float()) if behind_swiglu else x
    x_q, w_q, grad_q = exact(active, recipe.activation), exact(weight, recipe.weight), exact(grad, recipe.gradient)
    turned = exact(weight.t(), recipe.turned_weight).t()
    kept = exact(x, recipe.activation).to(x.dtype) if recipe.saves_fp8 else x
    grad_x = grad_q @ turned
    if behind_swiglu:
        again = kept.double().requires_grad_()
        (grad_x,) = torch.autograd.grad(swiglu(again), again, grad_x)
        kept = kernels().swiglu(kept)
    grad_w = inner(grad, recipe.inner_gradient).t() @ inner(kept, recipe.inner_activation)
    return x_q @ w_q.t(), grad_x, grad_w


def assert_close(found: torch.Tensor, right: torch.Tensor, tolerance: float, what: str) -> None:
    assert found.shape == right.shape, what
    assert found.isfinite().all(), f"{what}: memory that was never written"
    error = (found.double() - right).norm() / right.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def tolerance_of(recipe: Recipe, provider: str, behind_swiglu: bool) -> float:
    """SwiGLU's gradient is a BF16 product of BF16 factors."""
    rounded = 2.5e-3 if provider == "reference" or recipe.activation.scale == "ue8m0" else 4.5e-3
    return rounded + (4e-3 if behind_swiglu else 0)


seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@settings(max_examples=8)
@given(
    rows=st.integers(1, 150),
    width=st.integers(1, 160),
    outputs=st.integers(1, 140),
    behind_swiglu=st.booleans(),
    seed=seeds,
)
def test_a_dense_layer(recipe, provider, rows, width, outputs, behind_swiglu, seed):
    x = normal(seed, rows, 2 * width if behind_swiglu else width).requires_grad_()
    weight, grad = normal(seed + 1, outputs, width).requires_grad_(), normal(seed + 2, rows, outputs)
    state = state_of(recipe, provider)
    y = (state.swiglu_linear if behind_swiglu else state.linear)(x, weight)
    found = (y.detach(), *torch.autograd.grad(y, (x, weight), grad))
    right = expected(recipe, x.detach(), weight.detach(), grad, behind_swiglu=behind_swiglu)
    for name, one, other in zip(("y", "grad x", "grad w"), found, right, strict=True):
        assert_close(one, other, tolerance_of(recipe, provider, behind_swiglu), name)


def counts_of(groups: int) -> st.SearchStrategy[list[int]]:
    arbitrary = st.lists(st.integers(0, 60), min_size=groups, max_size=groups)
    return st.one_of(arbitrary, st.just([0] * (groups - 1) + [130]))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["block", "block16-e5m2", "mx"])
@settings(max_examples=8)
@given(data=st.data(), groups=st.integers(1, 5), behind_swiglu=st.booleans(), seed=seeds)
def test_groups_are_dense_layers_side_by_side(name, provider, data, groups, behind_swiglu, seed):
    """Tiles of a row and of one group's rows: nothing of another group has a part in them."""
    recipe, counts = RECIPES[name], data.draw(counts_of(groups))
    width, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    x = normal(seed, sum(counts), 2 * width if behind_swiglu else width).requires_grad_()
    weight, grad = normal(seed + 1, groups, outputs, width).requires_grad_(), normal(seed + 2, sum(counts), outputs)
    state = state_of(recipe, provider)
    y = (state.swiglu_grouped if behind_swiglu else state.grouped)(x, weight, torch.tensor(counts))
    grad_x, grad_w = torch.autograd.grad(y, (x, weight), grad)
    tolerance = tolerance_of(recipe, provider, behind_swiglu)
    parts = zip(*(tensor.split(counts) for tensor in (x.detach(), grad, y.detach(), grad_x)), strict=True)
    for group, (x_g, grad_g, y_g, grad_x_g) in enumerate(parts):
        if len(x_g) == 0:
            assert not grad_w[group].any(), "an empty group has no gradient"
            continue
        right = expected(recipe, x_g, weight[group].detach(), grad_g, behind_swiglu=behind_swiglu)
        for found, other in zip((y_g, grad_x_g, grad_w[group]), right, strict=True):
            assert_close(found, other, tolerance, f"group {group}")


@pytest.mark.parametrize("name", ["tensor", "tensor-float"])
def test_groups_with_one_scale(name):
    """Close to FP64 of the operands themselves: about 2.6% an operand."""
    counts, recipe = [30, 0, 65, 1], RECIPES[name]
    x, weight, grad = normal(0, 96, 40).requires_grad_(), normal(1, 4, 24, 40).requires_grad_(), normal(2, 96, 24)
    y = state_of(recipe).grouped(x, weight, torch.tensor(counts))
    found = torch.autograd.grad(y, (x, weight), grad)
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    right = torch.cat([part @ w64[group].t() for group, part in enumerate(x64.split(counts))])
    for one, other in zip((y, *found), (right, *torch.autograd.grad(right, (x64, w64), grad.double())), strict=True):
        assert_close(one, other, 0.045, "product")


def saved_bytes(compute: Any) -> int:
    """What autograd keeps for the backward pass, leaves apart."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.is_leaf and tensor.requires_grad else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(kept)


def test_a_layer_keeps_its_input_in_eight_bits():
    x, weight = normal(0, 64, 256).requires_grad_() * 1, normal(1, 32, 256).requires_grad_()
    kept = {name: saved_bytes(lambda n=name: state_of(RECIPES[n]).linear(x, weight)) for name in RECIPES}
    assert kept["block"] == 64 * 256 + 64 * 2, "E4M3 and a byte for each tile of 128"
    assert kept["block-float"] == 64 * 256 + 64 * 2 * 4
    assert kept["block-bf16-saved"] == 64 * 256 * 2
    narrow = normal(2, 32, 128).requires_grad_()
    behind_swiglu = saved_bytes(lambda: state_of(RECIPES["block"]).swiglu_linear(x, narrow))
    assert behind_swiglu == 64 * 256 + 64 * 2, "the SwiGLU's input alone"


@pytest.mark.parametrize("name", ["block", "mx", "tensor"])
def test_kept_weights_are_quantised_once_until_they_change(name):
    """And quantised weights that are not kept give the same results."""
    calls: list[torch.Size] = []
    recipe = RECIPES[name]
    outcomes = []
    for keep in (True, False):
        state = state_of(recipe, keep_weights=keep)
        plain = state.kernels.quantize

        def counting(x: torch.Tensor, *args: Any, plain: Any = plain, **options: Any) -> QTensor:
            calls.append(x.shape)
            quantized: QTensor = plain(x, *args, **options)
            return quantized

        object.__setattr__(state.kernels, "quantize", counting)
        x, weight = normal(0, 10, 48).requires_grad_(), normal(1, 20, 48).requires_grad_()
        for _ in range(3):
            y = state.linear(x, weight)
            outcome = (y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y)))
        outcomes.append(outcome)
        turns = 2 if name == "mx" else 1
        assert calls.count(weight.shape) == (turns if keep else 6), "once for each direction; else at each use"
        state.forget()
        calls.clear()
        changed = state.linear(x, weight * 2)
        assert calls.count(weight.shape) == (turns if keep else 1)
        assert torch.equal(changed, 2 * outcome[0])
        calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_storage_multiplies_in_bf16_and_keeps_eight_bits():
    recipe = block_recipe("fp8_block", 128, "ue8m0", E4M3, arithmetic="storage")
    x, weight, grad = normal(0, 40, 64).requires_grad_(), normal(1, 3, 24, 64).requires_grad_(), normal(2, 40, 24)
    counts = torch.tensor([17, 0, 23])
    state = state_of(recipe)
    y = state.grouped(x, weight, counts)
    plain = state.kernels.grouped_mm(x, weight, counts)
    assert torch.equal(y, plain)
    assert torch.equal(torch.autograd.grad(y, x, grad, retain_graph=True)[0], torch.autograd.grad(plain, x, grad)[0])
    stored = exact(x.detach(), recipe.activation).bfloat16().requires_grad_()
    again = state.kernels.grouped_mm(stored, weight, counts)
    assert torch.equal(torch.autograd.grad(y, weight, grad)[0], torch.autograd.grad(again, weight, grad)[0])
    big = normal(3, 64, 256).requires_grad_() * 1
    watched = weakref.ref(big)
    kept = state.linear(big, normal(4, 8, 256).requires_grad_())
    del big
    gc.collect()
    assert watched() is None, "the BF16 input is free while the graph lives"
    kept.sum().backward()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["block", "tensor", "mx"])
def test_what_is_not_finite_reaches_the_result(name, bad):
    """torch's cast alone would turn an infinity into 448."""
    x, weight = normal(0, 4, 64).requires_grad_(), normal(1, 8, 64).requires_grad_()
    grad = torch.ones(4, 8, dtype=torch.bfloat16)
    spoilt = grad.clone()
    spoilt[1, 2] = bad
    state = state_of(RECIPES[name])
    for gradient in torch.autograd.grad(state.linear(x, weight), (x, weight), spoilt):
        assert gradient.isnan().any()
    with torch.no_grad():
        x[2, 5] = bad
        assert state.linear(x, weight)[2].isnan().all()


def test_delayed_scales_come_from_past_steps():
    recipe = tensor_recipe("fp8_tensor_delayed", "float", E4M3, delayed=True)
    state = state_of(recipe, amax_history=2)
    weight = normal(1, 8, 16)
    x = normal(0, 4, 16)
    current = state_of(tensor_recipe("fp8_tensor_current", "float", E4M3)).linear(x, weight)
    assert torch.equal(state.linear(x, weight), current), "without a history, the present tensor sets the scale"
    assert state.amax_K[0] == x.abs().max()
    assert state.amax_K[1] == weight.abs().max()
    state.amax_history_KH.copy_(torch.tensor([[1.0, 0.5], [2.0, 4.0], [0.0, 0.0]]))
    state.forget()
    scale_x, scale_w = torch.tensor(1.0) / 448, torch.tensor(4.0) / 448
    right = (
        (x.float() / scale_x).clamp(-448, 448).to(E4M3).double()
        * scale_x.double()
        @ ((weight.float() / scale_w).to(E4M3).double() * scale_w.double()).t()
    )
    assert_close(state.linear(x, weight), right, 4.5e-3, "elements beyond the history saturate")
    before = state.amax_K.clone()
    state.eval().linear(10 * x, weight)
    assert torch.equal(state.amax_K, before), "evaluation leaves no trace"


def test_an_observer_sees_every_operand_and_product():
    seen: list[tuple[str, ...]] = []

    class Spy:
        wants_products = True

        def tensor(self, kind: str, x: torch.Tensor, quantized: QTensor) -> None:
            assert x.shape == quantized.shape
            seen.append(("tensor", kind))

        def product(self, kind, a, b, found, counts_E, layout, source=None):
            if layout == "rows":
                groups = zip(a.split(counts_E.tolist()), found.split(counts_E.tolist()), b, strict=True)
                errors = [(f.double() - x.double() @ m.double().t()).norm() for x, f, m in groups]
            else:
                groups = zip(a.split(counts_E.tolist()), b.split(counts_E.tolist()), found, strict=True)
                errors = [(f.double() - x.double().t() @ y.double()).norm() for x, y, f in groups]
            assert sum(errors) < 0.1 * found.norm()
            seen.append(("product", kind))

    state = state_of(RECIPES["block"])
    state.observer = Spy()
    x, weight = normal(0, 30, 64).requires_grad_(), normal(1, 2, 16, 32).requires_grad_()
    state.swiglu_grouped(x, weight, torch.tensor([11, 19])).sum().backward()
    assert sorted(seen) == [
        *(("product", kind) for kind in ("forward", "input_gradient", "weight_gradient")),
        *(("tensor", kind) for kind in ("activation", "activation", "gradient", "weight")),
    ]


def test_watching_tensors_alone_keeps_no_more_for_the_backward_pass():
    """A sampled step of a run must fit where the others do."""

    class Tensors:
        wants_products = False

        def tensor(self, kind: str, x: torch.Tensor, quantized: QTensor) -> None:
            seen.add(kind)

        def product(self, kind, a, b, found, counts_E, layout, source=None):
            raise AssertionError("nobody asked")

    seen: set[str] = set()
    state = state_of(RECIPES["block"])
    state.observer = Tensors()
    x = normal(0, 64, 256).requires_grad_() * 1
    watched = weakref.ref(x)
    y = state.linear(x, normal(1, 32, 256).requires_grad_())
    del x
    gc.collect()
    assert watched() is None
    y.sum().backward()
    assert seen == {"activation", "weight", "gradient"}


def test_rows_that_are_only_stored():
    """An embedding's rows are rounded, and the gradient passes."""
    rows = normal(0, 3, 5, 32).requires_grad_()
    out = state_of(RECIPES["mx"]).stored(rows)
    assert torch.equal(out, exact(rows.detach().flatten(0, 1), Format((1, 32))).bfloat16().view_as(out))
    grad = normal(1, 3, 5, 32)
    assert torch.equal(torch.autograd.grad(out, rows, grad)[0], grad)
