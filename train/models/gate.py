"""The gate of a layer with experts: scores, the choice, and the weights of the chosen.

B sequences, S positions, T = B·S tokens, K experts a token, E experts, D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from octofold.kernels.recompute import is_recomputing, recomputed
from octofold.kernels.registry import Kernels
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

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
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
        scores_TE, experts_TK = self._choose(logits_BSE.flatten(0, 1))
        weights_TK = scores_TE.gather(1, experts_TK)
        if c.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * c.routed_scaling_factor
        if self.training and self.has_losses:
            scores_BSE = scores_TE.view_as(logits_BSE)
            losses = balance_losses(c, logits_BSE, scores_BSE, experts_TK.view(*x_BSD.shape[:2], -1), self.sequence)
            weights_TK = inject(weights_TK, self._weighted(losses), self.loss_scale.to(exact))
        return experts_TK, weights_TK

    def _choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of all experts, and the chosen."""
        c, is_grouped = self.config, self.config.choice_groups > 1
        return self.kernels.gate_topk(
            logits_TE,
            self.e_score_correction_bias,
            k=c.num_experts_per_tok,
            scoring=c.scoring_func,
            groups=c.choice_groups,
            kept_groups=c.topk_group if is_grouped else 1,
            best=2 if is_grouped and c.topk_method == "noaux_tc" else 1,
        )

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
