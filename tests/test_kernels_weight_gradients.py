"""Gradients of weights that are computed later are those that would have been computed at once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_kernels_fp8 import RECIPES, normal, state_of
from tiny_models import SMALL, decoder, kernels_for, labels_of, positions_of, tokens_of

from octofold.kernels.weight_gradients import WeightGradients, grouped_inner_mm, grouped_mm, linear
from octofold.train.loss import summed_cross_entropy


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def gradients(
    product: Callable[[torch.Tensor, torch.Tensor, WeightGradients | None], torch.Tensor],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    later: WeightGradients | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of the input and of the weight, before and after what was left is done."""
    x, weight = random(*shapes[0], dtype=dtype), random(*shapes[1], seed=1, dtype=dtype)
    # A weight that is itself computed, as joined or split weights are.
    product(x, weight * 2, later).sin().sum().backward()
    before = None if weight.grad is None else weight.grad.clone()
    if later is not None:
        later.take()()
    assert x.grad is not None
    return x.grad, before, weight.grad


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_linear():
    shapes = (3, 4, 5), (6, 5)
    x, before, weight = gradients(linear, shapes, WeightGradients())
    expected_x, _, expected = gradients(linear, shapes, None)
    assert before is None
    same((x, weight), (expected_x, expected))


@pytest.mark.parametrize("counts", [[2, 0, 5], [7, 0, 0], [0, 0, 0]])
def test_grouped(counts):
    counts_E, kernels = torch.tensor(counts), kernels_for(SMALL, torch.float64)
    shapes = (sum(counts), 5), (3, 6, 5)
    x, before, weight = gradients(lambda x, w, q: grouped_mm(x, w, counts_E, kernels, q), shapes, WeightGradients())
    expected_x, _, expected = gradients(lambda x, w, q: kernels.grouped_mm(x, w, counts_E), shapes, None)
    assert before is None
    same((x, weight), (expected_x, expected))


def test_grouped_inner_product_as_torch_has_it():
    """What accelerators call instead of the loop; BF16, whose sums are FP32 in both."""
    counts_E = torch.tensor([16, 0, 32, 16])
    a, b = random(64, 8, dtype=torch.bfloat16).detach(), random(64, 16, seed=1, dtype=torch.bfloat16).detach()
    found = torch.nn.functional.grouped_mm(a.mT, b, offs=counts_E.cumsum(0).to(torch.int32))
    torch.testing.assert_close(found, grouped_inner_mm(a, b, counts_E), rtol=2e-2, atol=1e-2)


def test_a_taken_queue_is_done_once_and_the_next_begins_empty():
    later = WeightGradients()
    x, weight = random(3, 5), random(2, 5, seed=1)
    linear(x, weight, later).sum().backward()
    first = later.take()
    linear(x, weight, later).sum().backward()
    assert weight.grad is None
    first()
    once = weight.grad.clone()
    first()
    same(weight.grad, once)
    later.take()()
    same(weight.grad, 2 * once)


def test_without_gradients_nothing_is_left():
    later = WeightGradients()
    with torch.no_grad():
        same(linear(random(3, 5), random(2, 5), later), torch.nn.functional.linear(random(3, 5), random(2, 5)))
    later.take()()


@pytest.mark.parametrize("depths", [0, 1])
def test_a_model_leaves_its_products_for_later(depths):
    config = replace(SMALL, num_nextn_predict_layers=depths)
    tokens = tokens_of(config, 2, 9)
    ahead = [tokens.roll(-1, 1)] * depths

    def run(later: WeightGradients | None) -> dict[str, torch.Tensor | None]:
        model = decoder(config)
        for module in model.modules():
            if hasattr(module, "later"):
                setattr(module, "later", later)  # noqa: B010
        logits = model(tokens, positions_of(tokens), ahead=ahead)
        torch.stack([summed_cross_entropy(x, labels_of(tokens)) for x in logits]).sum().backward()
        missing = {name for name, p in model.named_parameters() if p.grad is None}
        if later is not None:
            # Norms, the embedding and gates are cheap and come at once.
            assert missing == {name for name in missing if "proj" in name or name == "lm_head.weight"}
            assert {"lm_head.weight", "layers.1.mlp.experts.down_proj", "layers.0.mlp.gate_proj.weight"} <= missing
            later.take()()
        return {name: p.grad for name, p in model.named_parameters()}

    same(run(WeightGradients()), run(None))


class Counter:
    """An observer that counts what it is shown."""

    wants_products = True

    def __init__(self) -> None:
        self.shown: list[str] = []

    def tensor(self, kind: str, x: torch.Tensor, quantized: object) -> None:
        self.shown.append(kind)

    def product(self, kind: str, *operands: object, **more: object) -> None:
        self.shown.append(kind)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("arithmetic", ["product", "storage"])
def test_fp8_bit_for_bit_and_seen_once(recipe, grouped, arithmetic):
    chosen, counts_E = replace(RECIPES[recipe], arithmetic=arithmetic), torch.tensor([16, 0, 16])

    def run(later: WeightGradients | None) -> tuple[Any, ...]:
        first, second, counter = state_of(chosen), state_of(chosen), Counter()
        for state in (first, second):
            state.later, state.observer = later, counter
        x, w = normal(0, 32, 32).requires_grad_(), normal(1, *([3] if grouped else []), 16, 32).requires_grad_()
        wide = normal(2, *([3] if grouped else []), 16, 16).requires_grad_()
        if grouped:
            out = first.grouped(x, w, counts_E).square().sum() + second.swiglu_grouped(x, wide, counts_E).sin().sum()
        else:
            out = first.linear(x, w).square().sum() + second.swiglu_linear(x, wide).sin().sum()
        out.backward()
        if later is not None:
            assert w.grad is None
            assert wide.grad is None
            later.take()()
        assert w.grad is not None
        assert wide.grad is not None
        return x.grad, w.grad, wide.grad, sorted(counter.shown)

    *found, seen = run(WeightGradients())
    *expected, seen_at_once = run(None)
    assert seen == seen_at_once
    for a, b in zip(found, expected, strict=True):
        # Stored operands are multiplied by torch, which may sum the rows of BF16 in another order.
        tolerance = {"rtol": 0.0, "atol": 0.0} if arithmetic == "product" else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(a, b, **tolerance)
