"""Expert parallelism: copies of tokens travel to the ranks that hold their experts and back.

Dropless: blocks are uneven, nothing is padded or lost. One host synchronisation a layer, for the sizes of the blocks.
N copies here, M copies received, E experts in all, L = E / ranks experts on each rank, D width.
"""

from typing import Protocol

import torch

from octofold.backends.collectives import Group, exchange_counts
from octofold.kernels.permute import Order
from octofold.kernels.registry import Kernels
from octofold.parallel.transport import Route, Traffic, Transport, exchange


class Experts(Protocol):
    """The stacked feed-forward networks of the experts that this rank holds."""

    def __call__(self, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor: ...


class LocalExperts:
    """Every expert is on this rank."""

    def __call__(self, experts: Experts, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return experts(x_ND, counts_E, kernels)


class ExchangedExperts:
    """Experts are split over the ranks of a group in logical order: rank r holds r·L … (r+1)·L − 1."""

    def __init__(self, group: Group, transport: Transport | None = None) -> None:
        self.group, self.transport = group, transport or Transport()
        self.ranks = group.size()
        self.traffic = Traffic()

    def __call__(self, experts: Experts, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        sent_RL = counts_E.view(self.ranks, -1)
        received_RL = exchange_counts(sent_RL, self.group)
        send_counts, receive_counts = torch.stack([sent_RL.sum(1), received_RL.sum(1)]).tolist()
        route, dtypes = Route(self.group, send_counts, receive_counts), self.transport
        x_MD = exchange(x_ND, route, kernels, self.traffic, purpose="dispatch", forward=dtypes.dispatch)
        # Blocks arrive by source rank and, inside, by expert; the grouped product wants them by expert.
        local_experts = torch.arange(received_RL.shape[1], device=x_ND.device).repeat(self.ranks)
        order = Order.by_expert(local_experts.repeat_interleave(received_RL.flatten()))
        y_MD = experts(kernels.permute(x_MD, order), received_RL.sum(0), kernels)
        y_MD = kernels.permute(y_MD, order.inverse)
        return exchange(y_MD, route.back, kernels, self.traffic, purpose="combine", backward=dtypes.gradient)
