"""Causal attention by torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

from octofold.kernels.recompute import recomputed
from octofold.kernels.reference.attention import visible_BQS
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """torch has a path for every device and floating dtype."""
    return None


def attention(
    q_BHQd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels/reference/attention.py."""
    value_width = v_BHSv.shape[-1]
    # The fused paths want one head width for all three; zero columns of v add zero columns of output.
    missing, padded = q_BHQd.shape[-1] - value_width, v_BHSv
    if missing > 0:
        padded = recomputed("up_projection", F.pad, v_BHSv, (0, missing))
    queries, length = q_BHQd.shape[2], k_BHSd.shape[2]
    # torch's own causal mask counts from the first query and the first key.
    if doc_ids_BS is None and queries == length:
        out = F.scaled_dot_product_attention(q_BHQd, k_BHSd, padded, is_causal=True, scale=scale)
    else:
        mask = visible_BQS(doc_ids_BS, queries, length, q_BHQd.device)[:, None]
        out = F.scaled_dot_product_attention(q_BHQd, k_BHSd, padded, attn_mask=mask, scale=scale)
    return out[..., :value_width]
