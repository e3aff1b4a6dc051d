"""The gate of a layer with experts: scores, the choice, and the weights of the chosen.

B sequences, S positions, T = B·S tokens, K experts a token, E experts, G groups of experts, D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from octofold.kernels.recompute import is_recomputing, recomputed
from octofold.parallel.sequence import WholeSequence
from octofold.train.models.balance import LOSSES, balance_losses, inject
from octofold.train.models.config import ModelConfig


class TopKGate(nn.Module):
    """The gates of DeepSeek-V2 and V3.

    softmax with greedy or group_limited_greedy choice (DeepSeek-V2, sections 2.2.1 and 2.2.2), or sigmoid with
    noaux_tc: a bias takes part in choosing and never in the weights (DeepSeek-V3, section 2.1.2).
    """

    load_E: torch.Tensor
    loss_scale: torch.Tensor
    loss_sums_J: torch.Tensor
    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sequence = WholeSequence()
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        bias = torch.zeros(experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        # What one sequence's balance loss counts in the gradient; 0 until a training step sets it.
        self.register_buffer("loss_scale", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("loss_sums_J", torch.zeros(len(LOSSES), dtype=torch.float32), persistent=False)
        self.has_losses = any(getattr(config.balance, f"{name}_loss") for name in LOSSES)

    def reset_balance(self) -> None:
        """Zero the buffers (a model made on the meta device has none)."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts, int64 [T, K], and their weights, FP32 (FP64 for FP64 input) [T, K].

        In training mode balance losses are added up in `loss_sums_J` and take part in the backward pass.
        """
        c = self.config
        exact = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
        # In BF16 the wide copy would be kept beside the norm's output that it is made of.
        exact_BSD = recomputed("norm", lambda x: x.to(exact), x_BSD)
        logits_BSE = nn.functional.linear(exact_BSD, self.weight.to(exact))
        scores_BSE = logits_BSE.softmax(-1) if c.scoring_func == "softmax" else logits_BSE.sigmoid()
        scores_TE = scores_BSE.flatten(0, 1)
        experts_TK = self._choose(scores_TE.detach())
        weights_TK = scores_TE.gather(1, experts_TK)
        if c.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * c.routed_scaling_factor
        if self.training and self.has_losses:
            losses = balance_losses(c, logits_BSE, scores_BSE, experts_TK.view(*x_BSD.shape[:2], -1), self.sequence)
            weights_TK = inject(weights_TK, self._weighted(losses), self.loss_scale.to(exact))
        return experts_TK, weights_TK

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        c = self.config
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias
        if c.n_group > 1 and c.topk_method != "greedy":
            scores_TGe = scores_TE.unflatten(1, (c.n_group, -1))
            best = 2 if c.topk_method == "noaux_tc" else 1
            groups_TM = scores_TGe.topk(best, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1, sorted=False).indices
            outside_TG = torch.ones_like(scores_TGe[..., 0], dtype=torch.bool).scatter_(1, groups_TM, False)
            scores_TE = scores_TGe.masked_fill(outside_TG[..., None], float("-inf")).flatten(1)
        return scores_TE.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices

    def _weighted(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, loss in losses.items() if not is_recomputing() else ():
            # Every rank that shares these sequences adds the same.
            self.loss_sums_J[LOSSES.index(name)] += loss.detach() / self.sequence.ranks
        return torch.stack([getattr(self.config.balance, f"{name}_loss") * loss for name, loss in losses.items()]).sum()


@torch.no_grad()
def take_loss_sums(gates: Sequence[TopKGate]) -> torch.Tensor:
    """What the gates have added up since last asked, summed over layers: one number for each of `LOSSES`."""
    sums_J = torch.zeros(len(LOSSES))
    for gate in gates:
        sums_J = sums_J.to(gate.loss_sums_J) + gate.loss_sums_J
        gate.loss_sums_J.zero_()
    return sums_J
