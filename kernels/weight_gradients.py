"""Products whose weight gradient may wait: what a split backward pass (zero bubble, DualPipeV) computes later.

A schedule that splits backward passes wants the gradient of a stage's input at once, so that the stage before it can go
on, and gradients of weights when there is nothing better to do. torch would find them by walking the graph twice, which
runs every autograd function that has both an activation and a weight twice, with all it counts and quantises. So these
products compute the gradient of their input in the one backward pass, and leave that of their weight in a queue.

N rows, K input width, M output width, E experts.
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F

from octofold.kernels import cpu_products
from octofold.kernels.cpu_products import matmul, widens
from octofold.kernels.registry import Kernels

Product = Callable[[], torch.Tensor]


class WeightGradients:
    """What the backward passes of a stage have left to do."""

    def __init__(self) -> None:
        self._left: deque[tuple[torch.Tensor, Product]] = deque()

    def leave(self, weight: torch.Tensor, gradient: Product) -> None:
        """Compute the gradient of `weight`, which may itself have been computed from parameters, later."""
        self._left.append((weight, gradient))

    def take(self) -> Callable[[], None]:
        """What computes all that has been left until now, and adds it to the gradients of parameters."""
        left, self._left = self._left, deque()

        def run() -> None:
            while left:
                weight, gradient = left.popleft()
                torch.autograd.backward(weight, gradient())

        return run


def linear(x: torch.Tensor, weight_MK: torch.Tensor, later: WeightGradients | None) -> torch.Tensor:
    """x wᵀ: [..., K] to [..., M]; with `later`, the weight's gradient is left there."""
    if later is None or not torch.is_grad_enabled():
        return cpu_products.linear(x, weight_MK)
    assert x.requires_grad
    product: torch.Tensor = _Linear.apply(x, weight_MK.detach(), (weight_MK,), later)
    return product


def grouped_mm(
    x_NK: torch.Tensor,
    w_EMK: torch.Tensor,
    counts_E: torch.Tensor,
    kernels: Kernels,
    later: WeightGradients | None,
) -> torch.Tensor:
    """The op of that name; with `later`, the weight's gradient is left there."""
    if later is None or not torch.is_grad_enabled():
        return kernels.grouped_mm(x_NK, w_EMK, counts_E)
    assert x_NK.requires_grad
    product: torch.Tensor = _GroupedMm.apply(x_NK, w_EMK.detach(), counts_E, (w_EMK,), kernels, later)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, held, later):
        ctx.save_for_backward(x, weight)
        # In a tuple, so that the graph does not see it: its gradient comes by the queue.
        (ctx.weight,), ctx.later = held, later
        return matmul(x, weight.mT) if widens(x) else F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.later.leave(ctx.weight, lambda: matmul(grad.flatten(0, -2).mT, x.flatten(0, -2)))
        return matmul(grad, weight), None, None, None


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, counts_E, held, kernels, later):
        ctx.save_for_backward(x, weight, counts_E)
        (ctx.weight,), ctx.kernels, ctx.later = held, kernels, later
        return kernels.grouped_mm(x, weight, counts_E)

    @staticmethod
    def backward(ctx, grad):
        x, weight, counts_E = ctx.saved_tensors
        ctx.later.leave(ctx.weight, lambda: grouped_inner_mm(grad, x, counts_E))
        return ctx.kernels.grouped_mm(grad, weight.transpose(1, 2), counts_E), None, None, None, None, None


def grouped_inner_mm(a_NM: torch.Tensor, b_NK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """aᵀ b over the rows of each expert, [E, M, K]; zero for an expert without rows."""
    if a_NM.shape[0] and a_NM.device.type != "cpu" and a_NM.dtype == torch.bfloat16:
        return F.grouped_mm(a_NM.mT, b_NK, offs=counts_E.cumsum(0).to(torch.int32))  # no wait for the sizes
    sizes = counts_E.tolist()
    return torch.stack([matmul(a.mT, b) for a, b in zip(a_NM.split(sizes), b_NK.split(sizes), strict=True)])
