"""Token permutation around experts by npu_moe_token_permute and npu_moe_token_unpermute, with torch_npu's gradients.

T tokens, K experts a token, N = T·K copies, D width. The operators take fewer than 2^24 copies.
"""

import torch

from octofold.kernels import torch_permute
from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.permute import Order
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16."""
    return why_no_npu(workload, (torch.bfloat16,))


def permute(x_TD: torch.Tensor, order: Order, copies: int = 1) -> torch.Tensor:
    """As kernels/reference/permute.py. What is not BF16 (quantised rows, their scales) goes by torch's gathers."""
    if x_TD.dtype != torch.bfloat16 or x_TD.dim() != 2 or x_TD.numel() == 0:
        return torch_permute.permute(x_TD, order, copies)
    # The operator sorts copies by their expert. The place of each copy sorts them into that place.
    places_TK = order.inverse_N.view(-1, copies)
    permuted: torch.Tensor = torch.ops.npu.npu_moe_token_permute(x_TD, places_TK)[0]
    return permuted


def unpermute(y_ND: torch.Tensor, weights_TK: torch.Tensor, order: Order) -> torch.Tensor:
    """As kernels/reference/permute.py."""
    if y_ND.dtype != torch.bfloat16 or y_ND.numel() == 0:
        return torch_permute.unpermute(y_ND, weights_TK, order)
    places_N = order.inverse_N.to(torch.int32)
    combined: torch.Tensor = torch.ops.npu.npu_moe_token_unpermute(y_ND, places_N, weights_TK.to(y_ND.dtype))
    return combined
