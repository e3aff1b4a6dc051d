"""DeepSeekMoE: shared experts that see every token, and routed experts chosen by a gate (DeepSeek-V2, section 2.2).

T tokens, K experts a token, E experts, N = T·K copies, D hidden width, I width of an expert (of this rank's slice).
"""

from typing import ClassVar

import torch
from torch import nn

from octofold.kernels.fp8 import Fp8State
from octofold.kernels.recompute import is_recomputing, recomputed
from octofold.kernels.registry import Kernels
from octofold.kernels.weight_gradients import WeightGradients, grouped_mm
from octofold.parallel.apply import local
from octofold.parallel.expert import ExpertRoute, LocalExperts, Routing
from octofold.train.models.config import ModelConfig
from octofold.train.models.gate import TopKGate
from octofold.train.models.layers import FeedForward

GATES = {"top_k": TopKGate}
"""By `ModelConfig.gate_kind`."""


class StackedExperts(nn.Module):
    """The feed-forward networks of all experts (of the local ones under expert parallelism), stacked [E, …]."""

    FP8_SLOTS: ClassVar[dict[str, str]] = {"gate_up_proj": "gate_up_fp8", "down_proj": "down_fp8"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_fp8: Fp8State | None = None
        self.down_fp8: Fp8State | None = None
        self.later: WeightGradients | None = None
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """[N, D], sorted by expert, to [N, D]."""
        # Gate and up are a dim of their own, so that a slice of the width has both.
        w_gate_up, w_down = local(self.gate_up_proj).flatten(1, 2), local(self.down_proj)
        if self.gate_up_fp8 is not None:
            gate_up = self.gate_up_fp8.grouped(x_ND, w_gate_up, counts_E)
        else:
            gate_up = grouped_mm(x_ND, w_gate_up, counts_E, kernels, self.later)
        if self.down_fp8 is not None:
            return self.down_fp8.swiglu_grouped(gate_up, w_down, counts_E)
        activated = recomputed("swiglu", kernels.swiglu, gate_up)
        return grouped_mm(activated, w_down, counts_E, kernels, self.later)


class MixtureOfExperts(nn.Module):
    """Shared experts plus the weighted sum of the chosen routed ones. Dropless."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate = GATES[config.gate_kind(layer)](config, kernels)
        self.experts = StackedExperts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared_width, kernels) if shared_width else None
        self.run_experts: ExpertRoute = LocalExperts()
        self.slot_E: torch.Tensor | None = None
        """Where each expert stands among the stacked ones (parallel/placement_moves.py); None: in logical order."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, P, D] to [B, P, D]; in training mode the gate's `load_E` counts the copies sent to each expert."""
        x_TD = x_BSD.flatten(0, 1)
        experts_TK, weights_TK = self.gate(x_BSD)
        chosen_N = experts_TK.flatten()
        # Not bincount, which waits for the device to hear how long its result is.
        counts_E = torch.zeros_like(self.gate.load_E).scatter_add_(0, chosen_N, torch.ones_like(chosen_N))
        if self.training and not is_recomputing():
            self.gate.load_E += counts_E
        if self.slot_E is not None:
            experts_TK, counts_E = self.slot_E[experts_TK], torch.zeros_like(counts_E).scatter(0, self.slot_E, counts_E)
        shared_BSD: torch.Tensor | None
        routed_TD, shared_BSD = self.run_experts(
            self.experts,
            x_TD,
            Routing(experts_TK, weights_TK, counts_E),
            self.kernels,
            lambda: None if self.shared_experts is None else self.shared_experts(x_BSD),
        )
        if shared_BSD is not None:
            return routed_TD.view_as(x_BSD) + shared_BSD
        return routed_TD.view_as(x_BSD)
