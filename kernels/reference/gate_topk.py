"""A gate's scores and the experts it chooses: the specification (DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2).

T tokens, E experts, K experts a token, G groups of experts, M groups that a token may choose from.
"""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def gate_topk(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    *,
    k: int,
    scoring: str,
    groups: int = 1,
    kept_groups: int = 1,
    best: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of all experts, and the k with the highest score plus bias.

    Args:
        logits_TE: FP32 or FP64.
        bias_E: takes part in choosing, never in the scores; of the dtype of the logits.
        scoring: softmax or sigmoid.
        groups: with more than one, experts are chosen from the `kept_groups` groups of neighbours whose `best` highest
            (1 or 2) add up to most.

    Returns:
        Scores [T, E] in the dtype of the logits; experts, int64 [T, K], in any order, without a gradient.
    """
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    biased_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if groups > 1:
        biased_TGe = biased_TE.unflatten(1, (groups, -1))
        groups_TM = biased_TGe.topk(best, dim=-1).values.sum(-1).topk(kept_groups, dim=-1, sorted=False).indices
        outside_TG = torch.ones_like(biased_TGe[..., 0], dtype=torch.bool).scatter_(1, groups_TM, False)
        biased_TE = biased_TGe.masked_fill(outside_TG[..., None], float("-inf")).flatten(1)
    return scores_TE, biased_TE.topk(k, dim=-1, sorted=False).indices
