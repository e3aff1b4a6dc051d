"""Causal attention: the specification.

B sequences, H heads, S positions, d width of queries and keys, v width of values.
"""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def visible_BSS(doc_ids_BS: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """Bool [B or 1, S, S]: may position i (row) see position j (column)? Earlier or same, and in the same document."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if doc_ids_BS is None:
        return visible
    return visible & (doc_ids_BS[:, :, None] == doc_ids_BS[:, None, :])


def attention(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v, causal, within a document where `doc_ids_BS` is given.

    Args:
        q_BHSd, k_BHSd, v_BHSv: the same floating dtype; BF16 is computed in FP32.
        scale: factor of the scores.
        doc_ids_BS: int64, non-decreasing along S; None lets a token see the whole sequence before it.

    Returns:
        [B, H, S, v] in the dtype of the operands.
    """
    exact = q_BHSd.dtype if q_BHSd.dtype in (torch.float32, torch.float64) else torch.float32
    scores = scale * q_BHSd.to(exact) @ k_BHSd.to(exact).transpose(-1, -2)
    visible = visible_BSS(doc_ids_BS, q_BHSd.shape[2], q_BHSd.device)
    weights = torch.softmax(scores.masked_fill(~visible[:, None], float("-inf")), dim=-1)
    return (weights @ v_BHSv.to(exact)).to(q_BHSd.dtype)
