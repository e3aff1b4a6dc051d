"""Next-token cross-entropy, summed: the caller divides by the valid tokens of the whole global batch."""

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of a position that does not count."""


def summed_cross_entropy(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Nats summed over the valid labels, FP32 scalar (FP64 for FP64 logits).

    Args:
        logits_BSV: any floating dtype; BF16 is computed in FP32.
        labels_BS: int64, `IGNORED` where a position does not count.
    """
    exact = torch.float64 if logits_BSV.dtype == torch.float64 else torch.float32
    logits = logits_BSV.flatten(0, 1).to(exact)
    return F.cross_entropy(logits, labels_BS.flatten(), ignore_index=IGNORED, reduction="sum")


def valid_tokens(labels_BS: torch.Tensor) -> int:
    """How many labels count."""
    return int((labels_BS != IGNORED).sum())
