"""Losses that even the load of experts, each sequence on its own, so that no layout changes them.

B sequences, S positions (of them those of this rank), E experts, K experts a token, G groups of experts.
"""

import torch

from octofold.parallel.sequence import WholeSequence
from octofold.train.models.config import ModelConfig

LOSSES = ("sequence", "expert", "device", "communication", "z")
"""`model.balance.<name>_loss` weighs each."""


def balance_losses(
    config: ModelConfig,
    logits_BSE: torch.Tensor,
    scores_BSE: torch.Tensor,
    experts_BSK: torch.Tensor,
    sequence: WholeSequence,
) -> dict[str, torch.Tensor]:
    """The losses that have a weight, unweighted, summed over sequences.

    With c_E the tokens that an expert receives of the S, and affinity shares p = s / Σ s:

        sequence        Σ_i f_i P_i, f = E/(KS) · c as if chosen by s alone, P = mean p   DeepSeek-V3, eq. 17-20
        expert          the same with c as chosen                                         DeepSeek-V2, eq. 23-25
        device          Σ_g f'_g P'_g, f' = mean of f and P' = sum of P over a group      DeepSeek-V2, eq. 26-28
        communication   Σ_g f"_g P'_g, f" = G/(MS) · tokens sent to the group, M = topk_group   DeepSeek-V2, eq. 29-31
        z               mean of logsumexp(logits)²                                        ST-MoE, eq. 5

    Args:
        logits_BSE, scores_BSE: of the gate, FP32 or FP64.
        experts_BSK: the chosen experts, int64.
        sequence: takes means over all positions, those of other ranks too.
    """
    wanted = [name for name in LOSSES if getattr(config.balance, f"{name}_loss")]
    groups, K = config.n_group, experts_BSK.shape[-1]
    share_BE = sequence.mean(scores_BSE / scores_BSE.sum(-1, keepdim=True))
    share_BG = share_BE.unflatten(1, (groups, -1)).sum(-1)
    chosen_BSE = torch.zeros_like(scores_BSE, requires_grad=False).scatter_(2, experts_BSK, 1.0)
    losses: dict[str, torch.Tensor] = {}
    if "sequence" in wanted:
        best_BSK = scores_BSE.detach().topk(K, dim=-1).indices
        alone_BE = sequence.mean(torch.zeros_like(chosen_BSE).scatter_(2, best_BSK, 1.0))
        losses["sequence"] = (alone_BE * share_BE).sum() * (config.n_routed_experts / K)
    load_BE = sequence.mean(chosen_BSE) * (config.n_routed_experts / K)
    if "expert" in wanted:
        losses["expert"] = (load_BE * share_BE).sum()
    if "device" in wanted:
        losses["device"] = (load_BE.unflatten(1, (groups, -1)).mean(-1) * share_BG).sum()
    if "communication" in wanted:
        sent_BG = sequence.mean(chosen_BSE.unflatten(2, (groups, -1)).amax(-1)) * (groups / config.topk_group)
        losses["communication"] = (sent_BG * share_BG).sum()
    if "z" in wanted:
        losses["z"] = sequence.mean(logits_BSE.logsumexp(-1).square()).sum()
    return losses


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, loss, scale):
        ctx.save_for_backward(scale)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad, scale.clone(), None


def inject(carrier: torch.Tensor, loss: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`carrier` unchanged; its backward pass also sends d(scale · loss).

    So a loss that arises inside the model needs no way out of it, and no pipeline stage needs the final loss.

    Args:
        loss, scale: scalars of one dtype.
    """
    injected: torch.Tensor = _Inject.apply(carrier, loss, scale)
    return injected
