"""Expert parallelism: tokens travel to the ranks that hold their experts, and the experts' outputs back.

A *route* maps tokens and the gate's choice to the weighted sum over the chosen experts. Routes differ in what crosses
which link, never in what is computed. Here: every expert on this rank, and the flat route, one copy of a token for each
of its experts. Dropless: blocks are uneven, nothing is padded or lost.

T tokens, K experts a token, N = T·K copies here, M copies received, E experts in all, R ranks, L = E / R experts a
rank, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from octofold.backends.collectives import Group, exchange_counts
from octofold.kernels.permute import Order
from octofold.kernels.registry import Kernels
from octofold.parallel.expert_rows import copy_rows, weigh_rows
from octofold.parallel.expert_slices import WholeExperts
from octofold.parallel.passage import Trip, travel
from octofold.parallel.transport import Route, Traffic, Transport, round_trip


class Experts(Protocol):
    """The stacked feed-forward networks of the experts that this rank holds."""

    def __call__(self, x_ND: torch.Tensor, counts_E: torch.Tensor, kernels: Kernels) -> torch.Tensor: ...


@dataclass(frozen=True)
class Routing:
    """What the gate chose."""

    experts_TK: torch.Tensor
    """int64."""
    weights_TK: torch.Tensor
    """FP32 (or FP64); differentiable."""
    counts_E: torch.Tensor
    """int64, copies for each expert."""


Beside = Callable[[], torch.Tensor | None]
"""What is computed while tokens travel (shared experts); called once."""


class ExpertRoute(Protocol):
    """The way to the experts and back."""

    def __call__(
        self, experts: Experts, x_TD: torch.Tensor, routing: Routing, kernels: Kernels, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σ_k weight · expert(x) for each token, [T, D], and what `beside` returned."""


class LocalExperts:
    """Every expert is on this rank."""

    def __call__(
        self, experts: Experts, x_TD: torch.Tensor, routing: Routing, kernels: Kernels, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = Order.by_expert(routing.experts_TK.flatten())
        copies_ND = kernels.permute(x_TD, order, copies=routing.experts_TK.shape[1])
        outputs_ND = experts(copies_ND, routing.counts_E, kernels)
        return kernels.unpermute(outputs_ND, routing.weights_TK, order), beside()


class ExchangedExperts(ABC):
    """What routes over several ranks share. Rank r of the group holds experts r·L … (r+1)·L − 1."""

    def __init__(
        self,
        group: Group,
        *,
        nodes: tuple[int, ...] = (),
        overlap: bool = True,
        slices: WholeExperts | None = None,
    ) -> None:
        """
        Args:
            nodes: the node of each rank of the group; empty: all are on one.
            overlap: compute what is beside while tokens travel, not after; the results are equal bit for bit.
            slices: where the experts of a rank are slices.
        """
        self.group, self.nodes, self.overlap = group, nodes, overlap
        self.slices = slices or WholeExperts()
        self.ranks = group.size()
        self.transport = Transport()
        self.traffic = Traffic()

    def __call__(
        self, experts: Experts, x_TD: torch.Tensor, routing: Routing, kernels: Kernels, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        done: list[torch.Tensor | None] = []

        def while_travelling() -> None:
            if self.overlap:
                done.append(beside())

        routed_TD = self._run(experts, x_TD, routing, kernels, while_travelling)
        return routed_TD, done[0] if done else beside()

    @abstractmethod
    def _run(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        routing: Routing,
        kernels: Kernels,
        while_travelling: Callable[[], None],
    ) -> torch.Tensor:
        """The routed sum, [T, D]; calls `while_travelling` once, when the tokens have departed."""

    def _compute(
        self, experts: Experts, x_MD: torch.Tensor, blocks_SBL: torch.Tensor, rows_S: list[int], kernels: Kernels
    ) -> torch.Tensor:
        """This rank's part of the exchange between its two travels: [M, D] to [M, D].

        Args:
            blocks_SBL: rows of each block and expert, of every rank that holds slices of these experts.
            rows_S: their sums.
        """
        x_AD = self.slices.gather(x_MD, rows_S, self.traffic)
        y_AD = run_blocks(experts, x_AD, blocks_SBL.flatten(0, 1), kernels)
        return self.slices.scatter(y_AD, rows_S, self.traffic)

    def _compute_choices(
        self,
        experts: Experts,
        x_MD: torch.Tensor,
        own_MK: torch.Tensor,
        weights_MK: torch.Tensor,
        blocks_SBL: torch.Tensor,
        rows_S: list[int],
        kernels: Kernels,
    ) -> torch.Tensor:
        """Σ weight · expert(x) over those of a row's choices that are experts of this rank: [M, D].

        Args:
            own_MK: number of the expert on this rank; L for those of other ranks.
            blocks_SBL: copies for each expert, in one block; `rows_S` their sums; see `_compute`.
        """
        # By expert; choices of other ranks stand last, beyond the end.
        choice_C = own_MK.flatten().argsort(stable=True)[: rows_S[self.slices.rank]]
        x_CD = copy_rows(x_MD, choice_C // own_MK.shape[1])
        return weigh_rows(self._compute(experts, x_CD, blocks_SBL, rows_S, kernels), weights_MK, choice_C)


class FlatExperts(ExchangedExperts):
    """A copy of a token travels straight to each of its experts. One host synchronisation a layer, for the sizes."""

    def _run(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        routing: Routing,
        kernels: Kernels,
        while_travelling: Callable[[], None],
    ) -> torch.Tensor:
        order = Order.by_expert(routing.experts_TK.flatten())
        copies_ND = kernels.permute(x_TD, order, copies=routing.experts_TK.shape[1])
        sent_RL = routing.counts_E.view(self.ranks, -1)
        received_RL = exchange_counts(sent_RL, self.group)
        blocks_SBL = self.slices.gather_counts(received_RL)
        send_counts, receive_counts, rows_S = read_counts(sent_RL.sum(1), received_RL.sum(1), blocks_SBL.sum((1, 2)))
        route = Route(self.group, send_counts, receive_counts, self.nodes)
        trip = Trip(*round_trip(route, kernels, self.traffic, "dispatch", forward=self.transport.dispatch))
        ticket = trip.depart(copies_ND)
        while_travelling()
        (x_MD,) = trip.arrive(ticket)
        y_MD = self._compute(experts, x_MD, blocks_SBL, rows_S, kernels)
        home = round_trip(route.back, kernels, self.traffic, "combine", backward=self.transport.gradient)
        (y_ND,) = travel(*home, y_MD)
        return kernels.unpermute(y_ND, routing.weights_TK, order)


def read_counts(*counts: torch.Tensor) -> list[list[int]]:
    """Several int64 vectors as numbers on the host: one synchronisation."""
    numbers = iter(torch.cat(counts).tolist())
    return [list(islice(numbers, len(vector))) for vector in counts]


def run_blocks(experts: Experts, x_MD: torch.Tensor, counts_BL: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """The experts' outputs for rows that stand in blocks, and inside a block by expert; in the same order.

    Args:
        counts_BL: rows of each block and expert.
    """
    blocks, held = counts_BL.shape
    if blocks == 1:
        return experts(x_MD, counts_BL[0], kernels)
    # The grouped product wants rows by expert.
    expert_BL = torch.arange(held, device=x_MD.device).repeat(blocks)
    order = Order.by_expert(expert_BL.repeat_interleave(counts_BL.flatten(), output_size=x_MD.shape[0]))
    y_MD = experts(kernels.permute(x_MD, order), counts_BL.sum(0), kernels)
    return kernels.permute(y_MD, order.inverse)
