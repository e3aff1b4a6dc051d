"""Token permutation around experts: copies sorted by expert, and their weighted sum in token order.

T tokens, K experts a token, N = T·K copies, D width. Both are written without scatter, so that the result does not
depend on the order of atomic additions.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """A permutation of the N copies: copy number t·K + k of token t stands at `inverse_N[t·K + k]`."""

    sorted_N: torch.Tensor
    inverse_N: torch.Tensor

    @staticmethod
    def by_expert(experts_N: torch.Tensor) -> "Order":
        """Copies sorted by expert, ties in token order. `experts_N`: int64 [N]."""
        sorted_N = torch.argsort(experts_N, stable=True)
        inverse_N = torch.empty_like(sorted_N)
        inverse_N[sorted_N] = torch.arange(len(sorted_N), device=sorted_N.device)
        return Order(sorted_N, inverse_N)

    @property
    def inverse(self) -> "Order":
        """The permutation that undoes this one."""
        return Order(self.inverse_N, self.sorted_N)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, sorted_N, inverse_N, copies):
        ctx.save_for_backward(inverse_N)
        ctx.copies = copies
        return x_TD.index_select(0, sorted_N // copies if copies > 1 else sorted_N)

    @staticmethod
    def backward(ctx, grad_ND):
        (inverse_N,) = ctx.saved_tensors
        grad = grad_ND.index_select(0, inverse_N)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[-1]).sum(1)
        return grad, None, None, None


def permute(x_TD: torch.Tensor, order: Order, copies: int = 1) -> torch.Tensor:
    """`copies` copies of each row of x, in the given order: [T·copies, D]. Differentiable in x."""
    permuted: torch.Tensor = _Permute.apply(x_TD, order.sorted_N, order.inverse_N, copies)
    return permuted


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weights_TK, sorted_N, inverse_N):
        ctx.save_for_backward(y_ND, weights_TK, sorted_N, inverse_N)
        y_TKD = y_ND.index_select(0, inverse_N).view(*weights_TK.shape, y_ND.shape[-1])
        return torch.bmm(weights_TK.to(y_ND.dtype)[:, None], y_TKD)[:, 0]

    @staticmethod
    def backward(ctx, grad_TD):
        y_ND, weights_TK, sorted_N, inverse_N = ctx.saved_tensors
        y_TKD = y_ND.index_select(0, inverse_N).view(*weights_TK.shape, y_ND.shape[-1])
        grad_weights = torch.bmm(y_TKD, grad_TD[:, :, None])[:, :, 0].to(weights_TK.dtype)
        copies = weights_TK.shape[1]
        grad_y = grad_TD.index_select(0, sorted_N // copies)
        # In the dtype of y: a mixed in-place product would go through two temporary copies.
        grad_y.mul_(weights_TK.flatten().index_select(0, sorted_N).to(grad_y.dtype)[:, None])
        return grad_y, grad_weights, None, None


def unpermute(y_ND: torch.Tensor, weights_TK: torch.Tensor, order: Order) -> torch.Tensor:
    """Σ_k weight[t, k] · (the copy of token t for its k-th expert): [T, D] in the dtype of y.

    Args:
        y_ND: copies in sorted order.
        weights_TK: FP32 (or FP64), rounded to the dtype of y for the sum.
    """
    combined: torch.Tensor = _Unpermute.apply(y_ND, weights_TK, order.sorted_N, order.inverse_N)
    return combined
