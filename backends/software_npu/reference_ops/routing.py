"""Tokens to their experts and back: npu_moe_token_permute, npu_moe_token_unpermute and gradients.

Legend: T tokens, K copies of a token, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, gradients, unknown


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


def token_unpermute(
    rows_ND: Tensor,
    places: Tensor,
    probs_TK: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Of each token the sum over its copies, each times its weight: [T, D]. `places`: where each copy lies."""
    if padded_mode or restore_shape:
        raise unknown("npu_moe_token_unpermute", f"padded_mode={padded_mode} restore_shape={restore_shape}")
    copies = 1 if probs_TK is None else probs_TK.shape[1]
    exact = torch.promote_types(rows_ND.dtype, torch.float32)
    rows_TKD = rows_ND[places.long()].unflatten(0, (-1, copies)).to(exact)
    if probs_TK is not None:
        rows_TKD = rows_TKD * probs_TK.to(exact)[..., None]
    return rows_TKD.sum(1).to(rows_ND.dtype)


def token_unpermute_with_rows(rows_ND: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The same, and the rows, which torch_npu keeps for the backward pass."""
    return token_unpermute(rows_ND, *args, **kwargs), rows_ND


def token_unpermute_grad(
    rows_ND: Tensor, dy_TD: Tensor, places: Tensor, probs_TK: Tensor | None = None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows and of the weights."""
    if probs_TK is None:
        return gradients(lambda rows: token_unpermute(rows, places), [rows_ND], dy_TD)[0], None
    d_rows, d_probs = gradients(lambda rows, probs: token_unpermute(rows, places, probs), [rows_ND, probs_TK], dy_TD)
    return d_rows, d_probs


def token_unpermute_grad_v2(
    dy_TD: Tensor,
    places: Tensor,
    rows: int,
    dtype: torch.dtype,
    probs_TK: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same; the rows are given where there are weights."""
    if permuted_tokens is None:
        permuted_tokens = dy_TD.new_zeros(rows, dy_TD.shape[1], dtype=dtype)
    return token_unpermute_grad(permuted_tokens, dy_TD, places, probs_TK)


KERNELS: Kernels = {
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_permute_grad": token_permute_grad,
    "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
    "npu_moe_token_unpermute": token_unpermute,
    "_npu_moe_token_unpermute": token_unpermute_with_rows,
    "npu_moe_token_unpermute_grad": token_unpermute_grad,
    "npu_moe_token_unpermute_grad_v2": token_unpermute_grad_v2,
}
