"""Next-token cross-entropy, summed: the caller divides by the valid tokens of the whole global batch."""

import torch
import torch.nn.functional as F

from octofold.backends.collectives import Group
from octofold.parallel.vocabulary import summed_cross_entropy as summed_over_ranks

IGNORED = -100
"""Label of a position that does not count."""


def summed_cross_entropy(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, vocabulary: Group | None = None
) -> torch.Tensor:
    """Nats summed over the valid labels, FP32 scalar (FP64 for FP64 logits).

    Args:
        logits_BSV: any floating dtype; BF16 is computed in FP32.
        labels_BS: int64, `IGNORED` where a position does not count.
        vocabulary: ranks that have the logits of some entries each, and the loss of all (parallel/vocabulary.py).
    """
    exact = torch.float64 if logits_BSV.dtype == torch.float64 else torch.float32
    logits = logits_BSV.flatten(0, 1).to(exact)
    if vocabulary is not None and vocabulary.size() > 1:
        return summed_over_ranks(logits, labels_BS.flatten(), IGNORED, vocabulary)
    return F.cross_entropy(logits, labels_BS.flatten(), ignore_index=IGNORED, reduction="sum")


def valid_tokens(labels_BS: torch.Tensor) -> int:
    """How many labels count."""
    return int((labels_BS != IGNORED).sum())
