"""Token permutation around experts by gathers both ways: no scatter, so no dependence on the order of additions.

T tokens, K experts a token, N = T·K copies, D width.
"""

import torch

from octofold.kernels.permute import Order
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """torch's gathers run everywhere, in any dtype."""
    return None


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
    """As kernels/reference/permute.py."""
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
    """As kernels/reference/permute.py, with the copies' gradients formed in the dtype of y."""
    combined: torch.Tensor = _Unpermute.apply(y_ND, weights_TK, order.sorted_N, order.inverse_N)
    return combined
