"""Balancing expert load without a loss: each expert's bias moves against the sign of its load error.

DeepSeek-V3, section 2.1.2, and arXiv 2408.15664. G MoE layers, E experts.
"""

import math

import torch

from octofold.backends.collectives import all_reduce_sum


@torch.no_grad()
def gather_loads(loads: list[torch.Tensor]) -> torch.Tensor:
    """Tokens routed to each expert over the whole global batch, FP64 [G, E]; the counters are reset.

    Args:
        loads: one int64 [E] counter a layer, over all of this rank's micro-batches.
    """
    loads_GE = all_reduce_sum(torch.stack(loads)).to(torch.float64)
    for load in loads:
        load.zero_()
    return loads_GE


@torch.no_grad()
def update_biases(biases: list[torch.Tensor], loads_GE: torch.Tensor, rate: float) -> None:
    """bias += rate · sign(mean load − load), in place.

    Args:
        biases: one FP32 [E] bias a layer.
        loads_GE: from `gather_loads`: summed over all ranks *before* the sign.
    """
    directions_GE = (loads_GE.mean(1, keepdim=True) - loads_GE).sign()
    for bias, direction_E in zip(biases, directions_GE, strict=True):
        bias.add_(direction_E.to(bias.dtype), alpha=rate)


def load_metrics(loads_GE: torch.Tensor) -> dict[str, torch.Tensor]:
    """How evenly each layer's experts are used, FP64 [G] each.

        imbalance       load of the busiest expert ÷ mean load; 1 is even
        unused_share    share of the experts that no token chose
        load_entropy    entropy of the load shares ÷ ln E: 1 is even, 0 is all on one expert

    Args:
        loads_GE: from `gather_loads`.
    """
    experts = loads_GE.shape[1]
    shares_GE = loads_GE / loads_GE.sum(1, keepdim=True)
    entropy_G = torch.special.entr(shares_GE).sum(1)
    return {
        "imbalance": shares_GE.amax(1) * experts,
        "unused_share": (loads_GE == 0).to(loads_GE.dtype).mean(1),
        # The load of a single expert is even by definition; its entropy is 0 of 0.
        "load_entropy": entropy_G / math.log(experts) if experts > 1 else torch.ones_like(entropy_G),
    }
