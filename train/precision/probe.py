"""Watches the products of FP8 layers: how far each is from the truth, and from what its recipe says.

Two errors of a product, in FP64, of all its elements together:

    error    against the product of the operands before they were quantised: what FP8 costs
    fault    against the product of the operands as the reference quantises them: what a provider does wrong

Both are relative to the norm of the product, or to the norm that its terms would have with random signs where they
cancel more than that (sums of gradients do): an error of rounding does not cancel with them.

What is to be expected. A mantissa of m bits rounds to steps of 2^(e-m), an error of 2^(e-m)/√12 rms, in a binade whose
numbers are 1.47·2^e rms: 2.5% for E4M3, 4.9% for E5M2; a product of two operands has the root of the sum of their
squares, 3.5% in E4M3, whatever its size. `error` may be `ERROR_MARGIN` times as much. A faultless provider's `fault`
is the rounding of its output to BF16, 0.1%, and of BF16 operands where scales are no powers of two, 0.15%. Scales too
small by two make 20%.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octofold.kernels.fp8 import ACTIVATION, GRADIENT, WEIGHT, Fp8State
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor, spread
from octofold.kernels.reference.quantize import quantize, quantize_groups, scales_of
from octofold.kernels.reference.scaled_mm import scaled_grouped_inner_mm, scaled_grouped_mm, scaled_mm

ROUNDING = {E4M3: 0.0245, E5M2: 0.049}
"""Relative rms error of numbers in the format."""
ERROR_MARGIN = 2.0
MOST_FAULT = dict.fromkeys(("forward", "input_gradient", "weight_gradient"), 0.01)
"""By kind of product."""
MOST_SATURATED = 1e-3
"""Share of a tensor's elements that may lie beyond the largest number; none do where scales come from the tensor."""
LAST_ROUNDED_DOWN = {E4M3: 464 / 448, E5M2: 61440 / 57344}
"""What still rounds to the largest number without saturating, as a multiple of it."""


@dataclass(frozen=True)
class ProductError:
    """Of one kind of product of a module; the worst seen."""

    error: float
    fault: float
    expected: float
    """The error of its formats."""


@dataclass(frozen=True)
class Accusation:
    """A number beyond its threshold."""

    module: str
    what: str
    """Such as "forward: fault" or "gradient: saturated"."""
    found: float
    threshold: float

    def __str__(self) -> str:
        return f"{self.module} {self.what} {self.found:.3%}, threshold {self.threshold:.3%}"


class Probe:
    """The observer of one module. Keeps the worst of what it sees."""

    def __init__(self, state: Fp8State) -> None:
        self.state = state
        self.products: dict[str, ProductError] = {}
        """By kind: forward, input_gradient, weight_gradient."""
        self.saturated: dict[str, float] = {}
        """Share of elements by kind of tensor: activation, weight, gradient."""

    @torch.no_grad()
    def tensor(self, kind: str, x: torch.Tensor, quantized: QTensor) -> None:
        """See `octofold.kernels.fp8.Observer`."""
        scale = spread(quantized.scale.float(), quantized.format.tile, quantized.shape)
        bound = quantized.format.largest * LAST_ROUNDED_DOWN[quantized.format.dtype] * scale
        share = float((x.float().abs() > bound).float().mean()) if x.numel() else 0.0
        self.saturated[kind] = max(share, self.saturated.get(kind, 0.0))

    @torch.no_grad()
    def product(
        self,
        kind: str,
        a: torch.Tensor,
        b: torch.Tensor,
        found: torch.Tensor,
        counts_E: torch.Tensor | None,
        layout: str,
    ) -> None:
        """See `octofold.kernels.fp8.Observer`."""
        exact, terms_norm = _exact_product(a.double(), b.double(), counts_E, layout)
        norm = max(float(exact.norm()), terms_norm)
        if norm == 0 and not found.any():
            return
        specified = self._specified(kind, a, b, counts_E)
        formats = self._formats(kind)
        new = ProductError(
            error=_ratio(found.double() - exact, norm),
            fault=_ratio(found.double() - specified, norm),
            expected=math.hypot(*(ROUNDING[format.dtype] for format in formats)),
        )
        old = self.products.get(kind, new)
        self.products[kind] = ProductError(_worse(new.error, old.error), _worse(new.fault, old.fault), new.expected)

    def _formats(self, kind: str) -> tuple[Format, Format]:
        recipe = self.state.recipe
        return {
            "forward": (recipe.activation, recipe.weight),
            "input_gradient": (recipe.gradient, recipe.turned_weight),
            "weight_gradient": (recipe.inner_gradient, recipe.inner_activation),
        }[kind]

    def _specified(self, kind: str, a: torch.Tensor, b: torch.Tensor, counts_E: torch.Tensor | None) -> torch.Tensor:
        """The product by the reference, of the operands as the recipe has them quantised: FP64."""
        format_a, format_b = self._formats(kind)
        tensor_a = ACTIVATION if kind == "forward" else GRADIENT
        tensor_b = ACTIVATION if kind == "weight_gradient" else WEIGHT
        scale_a, scale_b = self._delayed_scale(tensor_a, format_a), self._delayed_scale(tensor_b, format_b)
        accumulation = self.state.recipe.accumulation
        if kind != "weight_gradient":
            operands = quantize(a, format_a, scale=scale_a), quantize(b, format_b, scale=scale_b)
            if counts_E is None:
                return scaled_mm(*operands, out_dtype=torch.float64, accumulation=accumulation)
            return scaled_grouped_mm(*operands, counts_E, out_dtype=torch.float64, accumulation=accumulation)
        if counts_E is None:
            operands = quantize(a.mT, format_a, scale=scale_a), quantize(b.mT, format_b, scale=scale_b)
            return scaled_mm(*operands, out_dtype=torch.float64, accumulation=accumulation)
        operands = (
            quantize_groups(a, counts_E, format_a, scale=scale_a),
            quantize_groups(b, counts_E, format_b, scale=scale_b),
        )
        return scaled_grouped_inner_mm(*operands, counts_E, out_dtype=torch.float64, accumulation=accumulation)

    def _delayed_scale(self, tensor: int, format: Format) -> torch.Tensor | None:
        if not self.state.recipe.delayed:
            return None
        past = self.state.amax_history_KH[tensor].amax()
        return scales_of(torch.where(past > 0, past, self.state.amax_K[tensor]), format)


def watch(states: Mapping[str, Fp8State]) -> dict[str, Probe]:
    """A probe on each module, by name; kept weights are dropped, so that they are seen too."""
    probes = {}
    for name, state in states.items():
        state.forget()
        state.observer = probes[name] = Probe(state)
    return probes


def accusations(probes: Mapping[str, Probe]) -> list[Accusation]:
    """Everything beyond its threshold, the worst first; NaN counts as beyond.

    With scales of past steps a tensor that has grown saturates, which is the recipe's doing: there only `fault` counts.
    """
    found = []
    for module, probe in probes.items():
        found += [Accusation(module, f"{kind}: fault", p.fault, MOST_FAULT[kind]) for kind, p in probe.products.items()]
        if probe.state.recipe.delayed:
            continue
        for kind, product in probe.products.items():
            found.append(Accusation(module, f"{kind}: error", product.error, ERROR_MARGIN * product.expected))
        for kind, share in probe.saturated.items():
            found.append(Accusation(module, f"{kind}: saturated", share, MOST_SATURATED))
    beyond = [one for one in found if not one.found <= one.threshold]
    return sorted(beyond, key=lambda one: -math.inf if math.isnan(one.found) else -one.found / one.threshold)


def _exact_product(
    a: torch.Tensor, b: torch.Tensor, counts_E: torch.Tensor | None, layout: str
) -> tuple[torch.Tensor, float]:
    """The product of FP64 operands, and the norm that its terms would have with random signs."""
    if counts_E is None:
        left, right = (a, b.mT) if layout == "rows" else (a.mT, b)
        return left @ right, math.sqrt(_terms_energy(left, right))
    counts, energy = counts_E.tolist(), 0.0
    parts = []
    for group, rows in enumerate(a.split(counts)):
        left, right = (rows, b[group].mT) if layout == "rows" else (rows.mT, b.split(counts)[group])
        parts.append(left @ right)
        energy += _terms_energy(left, right)
    return torch.cat(parts) if layout == "rows" else torch.stack(parts), math.sqrt(energy)


def _terms_energy(left_MK: torch.Tensor, right_KN: torch.Tensor) -> float:
    """Sum of the squares of all terms of a product."""
    return float(left_MK.square().sum(0) @ right_KN.square().sum(1))


def _ratio(difference: torch.Tensor, norm: float) -> float:
    return float(difference.norm()) / norm if norm else math.inf


def _worse(x: float, y: float) -> float:
    return x if math.isnan(x) else y if math.isnan(y) else max(x, y)
