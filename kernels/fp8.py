"""Linear layers in FP8, dense and over groups of experts: what is quantised when, what is kept, what is multiplied.

forward          x and w are quantised, multiplied; x is kept as it was quantised
input gradient   dy is quantised along the output width and multiplied with w
weight gradient  the kept x and dy are quantised along the rows and multiplied

With power-of-two scales the second quantisation of x changes nothing but numbers that fall below the new tile's
smallest. A layer behind a SwiGLU keeps the SwiGLU's input, in FP8 too, and forms the rest again (DeepSeek-V3, 3.2.3).

Weights are quantised from what the layer is given: the BF16 weights that FSDP2 gathers. M rows, K input width, N output
width, E experts.
"""

from typing import Any, Protocol

import torch
from torch import nn

from octofold.kernels.qtensor import Format, QTensor
from octofold.kernels.recipe import Recipe
from octofold.kernels.recompute import is_recomputing
from octofold.kernels.reference.quantize import scales_of
from octofold.kernels.registry import Kernels
from octofold.kernels.torch_swiglu import swiglu_backward
from octofold.kernels.weight_gradients import WeightGradients, grouped_mm, linear

ACTIVATION, WEIGHT, GRADIENT = range(3)
HISTORY = "amax_history_KH"
"""The name of the buffer that delayed scaling keeps from step to step."""
TENSOR_KINDS = ("activation", "weight", "gradient")


class Observer(Protocol):
    """Looks at what is quantised and multiplied. Must not change it."""

    wants_products: bool
    """Whether `product` is called, for which unquantised operands are kept until the backward pass."""

    def tensor(self, kind: str, x: torch.Tensor, quantized: QTensor) -> None:
        """`x` was quantised for a forward product or an input gradient.

        Args:
            kind: one of `TENSOR_KINDS`.
        """

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
        """A product was formed from operands that were `a` and `b` before anything was quantised.

        Args:
            kind: forward, input_gradient or weight_gradient.
            counts_E: of a grouped product, rows of each group.
            layout: rows: found = a bᵀ (of each group's rows with its matrix); inner: found = aᵀ b (over each group's
                rows).
            source: of a weight gradient behind a SwiGLU, the SwiGLU's input [M, 2·K], which is what was kept; b is its
                output.
        """


class Fp8State(nn.Module):
    """What a linear layer, or a stack of experts, needs to compute in FP8 beside its weight."""

    amax_history_KH: torch.Tensor
    amax_K: torch.Tensor

    def __init__(
        self,
        recipe: Recipe,
        kernels: Kernels,
        *,
        keep_weights: bool,
        amax_history: int = 1,
        turned_copies: bool = False,
    ) -> None:
        """
        Args:
            keep_weights: hold quantised weights until `forget`; else quantise them at each use.
            amax_history: steps remembered for delayed scaling.
            turned_copies: accelerators multiply FP8 only where what is summed over is contiguous, so that the input
                gradient wants a transposed weight of its own; CPUs read a view.
        """
        super().__init__()
        self.recipe, self.kernels, self.keep_weights = recipe, kernels, keep_weights
        self.turned_copies = turned_copies or recipe.weight != recipe.turned_weight.transposed
        self.observer: Observer | None = None
        self.later: WeightGradients | None = None
        """Where gradients of weights are left, in the pipelines that compute them later."""
        self.loss_scale = 1.0
        """What gradients are multiplied by at present; their history is without it."""
        self._kept: dict[str, QTensor] = {}
        self._weight_amax: torch.Tensor | None = None
        if recipe.delayed:
            kinds = len(TENSOR_KINDS)
            # Largest magnitudes of the last steps, newest first, and of this step.
            self.register_buffer(HISTORY, torch.zeros(kinds, amax_history, dtype=torch.float32))
            self.register_buffer("amax_K", torch.zeros(kinds, dtype=torch.float32), persistent=False)

    @property
    def watching(self) -> Observer | None:
        """The observer, the first time; what is formed again has been seen."""
        return None if is_recomputing() else self.observer

    def forget(self) -> None:
        """The weight has changed."""
        self._kept.clear()

    def linear(self, x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """x wᵀ: [..., K] to [..., N] in the dtype of x."""
        if self.recipe.arithmetic == "storage":
            return self._storing(x, lambda: linear(x, weight_NK, self.later))
        out = self._product(x.flatten(0, -2), weight_NK, None, swiglu=False)
        return out.view(*x.shape[:-1], weight_NK.shape[0])

    def swiglu_linear(self, gate_up: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """swiglu(gate_up) wᵀ: [..., 2·K] to [..., N]."""
        if self.recipe.arithmetic == "storage":
            activated = self._storing(gate_up, lambda: self.kernels.swiglu(gate_up))
            return self._storing(activated, lambda: linear(activated, weight_NK, self.later))
        out = self._product(gate_up.flatten(0, -2), weight_NK, None, swiglu=True)
        return out.view(*gate_up.shape[:-1], weight_NK.shape[0])

    def grouped(self, x_MK: torch.Tensor, weight_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, each times the transposed matrix of its expert: [M, K] to [M, N]."""
        if self.recipe.arithmetic == "storage":
            return self._storing(x_MK, lambda: grouped_mm(x_MK, weight_ENK, counts_E, self.kernels, self.later))
        return self._product(x_MK, weight_ENK, counts_E, swiglu=False)

    def swiglu_grouped(self, gate_up: torch.Tensor, weight_ENK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """`grouped` of swiglu(gate_up): [M, 2·K] to [M, N]."""
        if self.recipe.arithmetic == "storage":
            activated = self._storing(gate_up, lambda: self.kernels.swiglu(gate_up))
            return self._storing(
                activated, lambda: grouped_mm(activated, weight_ENK, counts_E, self.kernels, self.later)
            )
        return self._product(gate_up, weight_ENK, counts_E, swiglu=True)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, counts_E: torch.Tensor | None, *, swiglu: bool
    ) -> torch.Tensor:
        waits = self.later is not None and torch.is_grad_enabled()
        # A weight whose gradient waits is hidden from the graph (kernels/weight_gradients.py).
        operands = (x, weight.detach() if waits else weight, counts_E)
        out: torch.Tensor = _Linear.apply(*operands, self, swiglu, (weight,) if waits else None)
        return out

    def weight(self, weight: torch.Tensor) -> QTensor:
        """w as the forward product wants it."""
        quantized = self._kept_or("forward", lambda: self._quantized_weight(weight, self.recipe.weight, turned=False))
        if self._weight_amax is not None and self.training:
            # Also where an evaluation has quantised it.
            self.amax_K[WEIGHT] = torch.maximum(self.amax_K[WEIGHT], self._weight_amax)
        return quantized

    def turned_weight(self, weight: torch.Tensor) -> QTensor:
        """wᵀ as the input gradient wants it."""
        if not self.turned_copies:
            return self.weight(weight).t()
        recipe = self.recipe
        return self._kept_or("turned", lambda: self._quantized_weight(weight, recipe.turned_weight, turned=True))

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as it is after being kept in FP8; the gradient passes unchanged. For embeddings."""
        out: torch.Tensor = _Stored.apply(x, self)
        return out

    def scale(self, kind: int, x: torch.Tensor, format: Format) -> torch.Tensor | None:
        """The scale of delayed scaling, and a note of what is there now; None where scales come from the tensor.

        Until a history exists, the present tensor takes its place.
        """
        if not self.recipe.delayed:
            return None
        now = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        if kind == WEIGHT:
            self._weight_amax = now
        elif self.training:
            self.amax_K[kind] = torch.maximum(self.amax_K[kind], now)
        return self._scale_from(now, kind, format)

    def scale_again(self, kind: int, format: Format) -> torch.Tensor | None:
        """The scale that this step has used already, without a second note."""
        return self._scale_from(self.amax_K[kind], kind, format) if self.recipe.delayed else None

    def _scale_from(self, now: torch.Tensor, kind: int, format: Format) -> torch.Tensor:
        past = self.amax_history_KH[kind].amax() * (self.loss_scale if kind == GRADIENT else 1.0)
        return scales_of(torch.where(past > 0, past, now), format)

    @torch.no_grad()
    def remember(self, amax_K: torch.Tensor) -> None:
        """Delayed scaling: make the largest magnitudes of a step the newest of the history, and begin the next step."""
        history_KH = self.amax_history_KH.roll(1, dims=1)
        history_KH[:, 0] = amax_K
        history_KH[GRADIENT, 0] /= self.loss_scale
        self.amax_history_KH.copy_(history_KH)
        self.amax_K.zero_()
        self.forget()

    def _quantized_weight(self, weight: torch.Tensor, format: Format, *, turned: bool) -> QTensor:
        scale = self.scale(WEIGHT, weight, format)
        quantized = self.kernels.quantize(
            weight, format.transposed if turned else format, transpose=turned, scale=scale
        )
        if self.watching is not None and not turned:
            self.watching.tensor("weight", weight, quantized)
        return quantized

    def _kept_or(self, use: str, make: Any) -> QTensor:
        if not self.keep_weights:
            made: QTensor = make()
            return made
        if use not in self._kept:
            self._kept[use] = make()
        return self._kept[use]

    def _storing(self, x: torch.Tensor, compute: Any) -> torch.Tensor:
        """`compute` with what it keeps of x in FP8."""
        # The graph keeps the hooks, so they must not keep x.
        place, numel = x.data_ptr(), x.numel()

        def pack(kept: torch.Tensor) -> Any:
            if not self.recipe.saves_fp8 or kept.data_ptr() != place or kept.numel() != numel:
                return kept
            rows = kept.flatten(0, -2)
            scale = self.scale(ACTIVATION, rows, self.recipe.activation)
            quantized = self.kernels.quantize(rows, self.recipe.activation, scale=scale)
            if self.watching is not None:
                self.watching.tensor("activation", rows, quantized)
            return quantized, kept.shape, kept.dtype

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            quantized, shape, dtype = packed
            return self.kernels.dequantize(quantized, dtype).view(shape)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out: torch.Tensor = compute()
        return out


class _Linear(torch.autograd.Function):
    """y = f(x) wᵀ with f the identity or SwiGLU, over all rows or by groups of rows."""

    @staticmethod
    def forward(ctx, x, weight, counts_E, state, swiglu, waiting):
        recipe, kernels = state.recipe, state.kernels
        active = kernels.swiglu(x.float()) if swiglu and (recipe.delayed or state.watching is not None) else x
        scale = state.scale(ACTIVATION, active, recipe.activation)
        quantize = kernels.swiglu_quantize if swiglu else kernels.quantize
        x_q, w_q = quantize(x, recipe.activation, scale=scale), state.weight(weight)
        out = _rows_product(state, x_q, w_q, counts_E, x.dtype)
        ctx.observed = None
        if state.watching is not None:
            state.watching.tensor("activation", active, x_q)
        if state.watching is not None and state.watching.wants_products:
            state.watching.product("forward", active, weight, out, counts_E, "rows")
            ctx.observed = (active, weight, x if swiglu else None)
        ctx.state, ctx.swiglu, ctx.dtype, ctx.waiting = state, swiglu, x.dtype, waiting
        ctx.format = recipe.activation if recipe.saves_fp8 else None
        if not recipe.saves_fp8:
            kept = (x, None)
        elif swiglu:
            # Not the SwiGLU's output, which is half as wide but would need the input besides.
            inputs = kernels.quantize(x, recipe.activation)
            if state.watching is not None:
                state.watching.tensor("activation", x, inputs)
            kept = (inputs.data, inputs.scale)
        else:
            kept = (x_q.data, x_q.scale)
        # Kept quantised, the weight itself need not be: it may be a copy, of two weights joined.
        ctx.turned = state.turned_weight(weight) if state.keep_weights and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(*kept, counts_E, weight if ctx.turned is None else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        kept, kept_scale, counts_E, weight = ctx.saved_tensors
        state, recipe, kernels = ctx.state, ctx.state.recipe, ctx.state.kernels
        observer = state.watching
        format, dtype, swiglu, observed = ctx.format, ctx.dtype, ctx.swiglu, ctx.observed

        def kept_input() -> torch.Tensor:
            return kept if format is None else kernels.dequantize(QTensor(kept, kept_scale, format), dtype)

        grad = grad.contiguous()
        scale = state.scale(GRADIENT, grad, recipe.gradient)
        grad_q = kernels.quantize(grad, recipe.gradient, scale=scale)
        turned = state.turned_weight(weight) if ctx.turned is None else ctx.turned
        grad_x = _rows_product(state, grad_q, turned, counts_E, dtype)
        if observer is not None:
            observer.tensor("gradient", grad, grad_q)
        if observer is not None and observed is not None:
            observer.product("input_gradient", grad, observed[1].mT, grad_x, counts_E, "rows")
        inner_scale = state.scale_again(ACTIVATION, recipe.inner_activation)

        def weight_gradient() -> torch.Tensor:
            active = kernels.swiglu(kept_input()) if swiglu else kept_input()
            operands = (grad, recipe.inner_gradient, scale), (active, recipe.inner_activation, inner_scale)
            grad_w = _inner_product(state, *operands, counts_E)
            if observer is not None and observed is not None:
                before, _, source = observed
                observer.product("weight_gradient", grad, before, grad_w, counts_E, "inner", source=source)
            return grad_w

        if ctx.waiting is not None:
            state.later.leave(*ctx.waiting, weight_gradient)
        grad_w = weight_gradient() if ctx.needs_input_grad[1] else None
        if swiglu:
            grad_x = swiglu_backward(kept_input(), grad_x)
        return grad_x, grad_w, None, None, None, None


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state):
        rows = x.flatten(0, -2)
        quantized = state.kernels.quantize(rows, state.recipe.activation)
        if state.watching is not None:
            state.watching.tensor("weight", rows, quantized)
        return state.kernels.dequantize(quantized, x.dtype).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _rows_product(
    state: Fp8State, rows: QTensor, matrices: QTensor, counts_E: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Forward product or input gradient."""
    options: dict[str, Any] = {"out_dtype": dtype, "accumulation": state.recipe.accumulation}
    if counts_E is None:
        return state.kernels.scaled_mm(rows, matrices, **options)
    return state.kernels.scaled_grouped_mm(rows, matrices, counts_E, **options)


def _inner_product(
    state: Fp8State,
    left: tuple[torch.Tensor, Format, torch.Tensor | None],
    right: tuple[torch.Tensor, Format, torch.Tensor | None],
    counts_E: torch.Tensor | None,
) -> torch.Tensor:
    """Weight gradient, from (tensor, format of its transpose, delayed scale) of dy and x."""
    kernels, turned = state.kernels, []
    for x, format, scale in (left, right):
        if counts_E is None:
            turned.append(kernels.quantize(x, format.transposed, transpose=True, scale=scale))
        else:
            turned.append(kernels.quantize_groups(x, counts_E, format, scale=scale))
    options: dict[str, Any] = {"out_dtype": left[0].dtype, "accumulation": state.recipe.accumulation}
    if counts_E is None:
        return kernels.scaled_mm(*turned, **options)
    return kernels.scaled_grouped_inner_mm(*turned, counts_E, **options)
