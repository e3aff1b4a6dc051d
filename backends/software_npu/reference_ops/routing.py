"""Tokens to their experts: npu_moe_token_permute and its gradients. Legend: T tokens, K copies of a token, D width."""

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, unknown


def token_permute(
    tokens_TD: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows in the order of their experts, and where each copy went: [T * K, D] and int32 [T * K].

    `indices`: [T, K] or [T], the expert of each copy.
    """
    if padded_mode or num_out_tokens:
        raise unknown("npu_moe_token_permute", f"padded_mode={padded_mode} num_out_tokens={num_out_tokens}")
    copies = indices.numel() // len(tokens_TD)
    order = indices.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return tokens_TD[order // copies], places.to(torch.int32)


def token_permute_grad(
    tokens_TD: Tensor, d_rows: Tensor, indices: Tensor, places: Tensor, padded_mode: bool = False
) -> Tensor:
    """Gradient of the tokens: of each the sum over its copies."""
    return token_permute_grad_v2(d_rows, places, len(tokens_TD), tokens_TD.dtype, len(places) // len(tokens_TD))


def token_permute_grad_v2(
    d_rows: Tensor, places: Tensor, tokens: int, dtype: torch.dtype, copies: int, padded_mode: bool = False
) -> Tensor:
    """The same, for who no longer has the tokens."""
    return d_rows[places.long()].view(tokens, copies, -1).float().sum(1).to(dtype)


KERNELS: Kernels = {
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_permute_grad": token_permute_grad,
    "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
}
