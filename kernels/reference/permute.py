"""Token permutation around experts, and the weighted sum of copies in token order: the specification.

T tokens, K experts a token, N = T·K copies, D width.
"""

import torch

from octofold.kernels.permute import Order
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def permute(x_TD: torch.Tensor, order: Order, copies: int = 1) -> torch.Tensor:
    """`copies` copies of each row of x, in the given order: [T·copies, D]. Differentiable in x."""
    return x_TD.repeat_interleave(copies, 0)[order.sorted_N]


def unpermute(y_ND: torch.Tensor, weights_TK: torch.Tensor, order: Order) -> torch.Tensor:
    """Σ_k weight[t, k] · (the copy of token t for its k-th expert): [T, D] in the dtype of y.

    Products and sums are FP32 (FP64 for y in FP64) and rounded once. Differentiable in y and in the weights.

    Args:
        y_ND: copies in sorted order.
        weights_TK: FP32 (or FP64), rounded to the dtype of y for the sum.
    """
    exact = torch.float64 if y_ND.dtype == torch.float64 else torch.float32
    y_TKD = y_ND[order.inverse_N].view(*weights_TK.shape, y_ND.shape[-1])
    return (y_TKD.to(exact) * weights_TK.to(y_ND.dtype).to(exact)[..., None]).sum(1).to(y_ND.dtype)
