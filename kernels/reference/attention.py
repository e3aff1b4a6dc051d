"""Causal attention: the specification.

B sequences, H heads, S positions, Q queries (of the last positions), d width of queries and keys, v width of values.
"""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def visible_BQS(doc_ids_BS: torch.Tensor | None, queries: int, length: int, device: torch.device) -> torch.Tensor:
    """Bool [B or 1, Q, S]: may query i (row) see position j (column)? Earlier or same, and in the same document."""
    visible = torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)[None]
    if doc_ids_BS is None:
        return visible
    return visible & (doc_ids_BS[:, length - queries :, None] == doc_ids_BS[:, None, :])


def attention(
    q_BHQd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v, causal, within a document where `doc_ids_BS` is given.

    Args:
        q_BHQd, k_BHSd, v_BHSv: the same floating dtype; BF16 is computed in FP32. Queries are of the last Q positions.
        scale: factor of the scores.
        doc_ids_BS: int64, non-decreasing along S; None lets a token see the whole sequence before it.

    Returns:
        [B, H, Q, v] in the dtype of the operands.
    """
    exact = q_BHQd.dtype if q_BHQd.dtype in (torch.float32, torch.float64) else torch.float32
    scores = scale * q_BHQd.to(exact) @ k_BHSd.to(exact).transpose(-1, -2)
    visible = visible_BQS(doc_ids_BS, q_BHQd.shape[2], k_BHSd.shape[2], q_BHQd.device)
    weights = torch.softmax(scores.masked_fill(~visible[:, None], float("-inf")), dim=-1)
    return (weights @ v_BHSv.to(exact)).to(q_BHQd.dtype)
