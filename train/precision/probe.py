"""Watches the products of FP8 layers: how far each is from the truth, and from what its recipe says.

Two errors of a product, in FP64:

    error    against the product of the operands before anything was quantised, all elements together: what FP8 costs
    fault    against the product of the operands as the reference quantises them, in the worst group: what a provider
             does wrong

Both are relative to the norm of the product, or to the norm that its terms would have with random signs where they
cancel more than that (sums of gradients do): an error of rounding does not cancel with them.

The reference follows an operand all the way. The activation of a weight gradient is quantised for the forward pass,
kept, dequantised to BF16 and quantised again along the rows; behind a SwiGLU it is the SwiGLU's input that is kept. An
input gradient behind a SwiGLU is looked at before the SwiGLU's backward, which no provider does.

What is to be expected. A mantissa of m bits rounds to steps of 2^(e-m), an error of 2^(e-m)/√12 rms, in a binade whose
numbers are 1.47·2^e rms: 2.5% for E4M3, 4.9% for E5M2. Errors that know nothing of each other add as the root of the
sum of their squares: 3.5% for two operands in E4M3, whatever the size of the product. In a weight gradient one rounding
of the activation becomes two where it was kept with FP32 scales, 4.2% in all, for the second has scales of its own; and
three behind a SwiGLU, of gate, up and their product, 4.9%. (Gates count for a little more, and numbers below the
smallest of their tile are lost: Gaussian operands make 3.8%, 4.5% and 5.5%. Terms that add up, as gradients of tokens
that are alike do, make less.) `error` may be `ERROR_MARGIN` times as much. A faultless provider's `fault` is the
rounding of its output to BF16, 0.17%, and of BF16 operands where scales are no powers of two, 0.3%. Scales too small by
two make 20%.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octofold.kernels.fp8 import ACTIVATION, GRADIENT, WEIGHT, Fp8State
from octofold.kernels.qtensor import E4M3, E5M2, Format, QTensor, spread
from octofold.kernels.reference.quantize import quantize, quantize_groups
from octofold.kernels.reference.scaled_mm import dequantize, scaled_grouped_inner_mm, scaled_grouped_mm, scaled_mm

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

    wants_products = True

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
        source: torch.Tensor | None = None,
    ) -> None:
        """See `octofold.kernels.fp8.Observer`."""
        if not (a.any() and b.any()) and not found.any():
            return  # Nothing was multiplied.
        exact, norms = _exact_product(a.double(), b.double(), counts_E, layout)
        found, by_rows = found.double(), layout == "rows"
        specified = self._specified(kind, a, b, counts_E, source)
        errors = [float(part.norm()) for part in _parts(found - exact, counts_E, by_rows=by_rows)]
        faults = [float(part.norm()) for part in _parts(found - specified, counts_E, by_rows=by_rows)]
        new = ProductError(
            error=_ratio(math.hypot(*errors), math.hypot(*norms)),
            fault=functools.reduce(_worse, map(_ratio, faults, norms)),
            expected=self._expected(kind, behind_swiglu=source is not None),
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

    def _expected(self, kind: str, *, behind_swiglu: bool) -> float:
        """The error of all roundings on the way to a product."""
        recipe, (format_a, format_b) = self.state.recipe, self._formats(kind)
        roundings = 1
        if kind == "weight_gradient" and recipe.saves_fp8:
            # Powers of two, or one scale for all, leave nothing to round the second time.
            survives = format_b.scale == "ue8m0" or format_b.tile == (0, 0)
            roundings = 3 if behind_swiglu else 1 if survives else 2
        return math.hypot(ROUNDING[format_a.dtype], math.sqrt(roundings) * ROUNDING[format_b.dtype])

    def _specified(
        self,
        kind: str,
        a: torch.Tensor,
        b: torch.Tensor,
        counts_E: torch.Tensor | None,
        source: torch.Tensor | None,
    ) -> torch.Tensor:
        """The product by the reference, of the operands as the recipe has them quantised: FP64."""
        state, (format_a, format_b) = self.state, self._formats(kind)
        accumulation = state.recipe.accumulation
        scale_a = state.scale_again(ACTIVATION if kind == "forward" else GRADIENT, format_a)
        scale_b = state.scale_again(ACTIVATION if kind == "weight_gradient" else WEIGHT, format_b)
        if kind != "weight_gradient":
            operands = quantize(a, format_a, scale=scale_a), quantize(b, format_b, scale=scale_b)
            if counts_E is None:
                return scaled_mm(*operands, out_dtype=torch.float64, accumulation=accumulation)
            return scaled_grouped_mm(*operands, counts_E, out_dtype=torch.float64, accumulation=accumulation)
        b = self._as_kept(b, source)
        if counts_E is None:
            operands = quantize(a.mT, format_a, scale=scale_a), quantize(b.mT, format_b, scale=scale_b)
            return scaled_mm(*operands, out_dtype=torch.float64, accumulation=accumulation)
        operands = (
            quantize_groups(a, counts_E, format_a, scale=scale_a),
            quantize_groups(b, counts_E, format_b, scale=scale_b),
        )
        return scaled_grouped_inner_mm(*operands, counts_E, out_dtype=torch.float64, accumulation=accumulation)

    def _as_kept(self, x: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
        """The activation as the backward pass has it, from what there was before anything was quantised."""
        state, recipe = self.state, self.state.recipe
        kept = x if source is None else source
        if recipe.saves_fp8:
            # A SwiGLU's input is kept with scales of its own, whatever the recipe.
            scale = state.scale_again(ACTIVATION, recipe.activation) if source is None else None
            kept = dequantize(quantize(kept, recipe.activation, scale=scale), kept.dtype)
        return kept if source is None else state.kernels.swiglu(kept)


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
) -> tuple[torch.Tensor, list[float]]:
    """The product of FP64 operands, and the norm that each group's is measured by."""
    parts, norms = [], []
    a_parts = _parts(a, counts_E, by_rows=True)
    for a_part, b_part in zip(a_parts, _parts(b, counts_E, by_rows=layout == "inner"), strict=True):
        left_MK, right_KN = (a_part, b_part.mT) if layout == "rows" else (a_part.mT, b_part)
        parts.append(left_MK @ right_KN)
        # The sum of the squares of all terms.
        energy = float(left_MK.square().sum(0) @ right_KN.square().sum(1))
        norms.append(max(float(parts[-1].norm()), math.sqrt(energy)))
    if counts_E is None:
        return parts[0], norms
    return torch.cat(parts) if layout == "rows" else torch.stack(parts), norms


def _parts(x: torch.Tensor, counts_E: torch.Tensor | None, *, by_rows: bool) -> tuple[torch.Tensor, ...]:
    """The rows, or else the matrix, of each group."""
    if counts_E is None:
        return (x,)
    return x.split(counts_E.tolist()) if by_rows else x.unbind()


def _ratio(difference: float, norm: float) -> float:
    return difference / norm if norm else math.inf if difference else 0.0


def _worse(x: float, y: float) -> float:
    return x if math.isnan(x) else y if math.isnan(y) else max(x, y)
