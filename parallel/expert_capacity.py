"""Routing without host synchronisation: every expert has a fixed number of places for each rank's tokens.

What finds no place is dropped (its expert contributes nothing) and counted; copies with the largest weights of the gate
come first, as in DeepSeek-V2 (arXiv 2405.04434, section 2.2.3). All sizes are known beforehand: nothing waits for the
device. How much is dropped depends on the layout, since every rank fills its own places; so this is an option, for
ranks that all have as many tokens, and never the default. Where no gradient is asked for (evaluation, generation)
nothing is dropped.

T tokens, K experts a token, N = T·K copies, E experts, C places, R ranks, L = E / R experts a rank, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from octofold.backends.collectives import Group
from octofold.kernels.recompute import is_recomputing
from octofold.kernels.registry import Kernels
from octofold.parallel.expert import Experts, FlatExperts, Routing
from octofold.parallel.expert_rows import copy_rows, weigh_rows
from octofold.parallel.expert_slices import WholeExperts
from octofold.parallel.passage import Trip, travel
from octofold.parallel.transport import Route, round_trip


class CapacityExperts(FlatExperts):
    """The flat route with a fixed number of places."""

    def __init__(
        self,
        group: Group,
        factor: float,
        *,
        nodes: tuple[int, ...] = (),
        overlap: bool = True,
        slices: WholeExperts | None = None,
    ) -> None:
        """`factor`: places of an expert for a rank's copies, as a multiple of the mean (N / E), rounded up."""
        super().__init__(group, nodes=nodes, overlap=overlap, slices=slices)
        self.factor = factor

    def _run(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        routing: Routing,
        kernels: Kernels,
        while_travelling: Callable[[], None],
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super()._run(experts, x_TD, routing, kernels, while_travelling)
        tokens, slots = routing.experts_TK.shape
        total = routing.counts_E.shape[0]
        places, held = math.ceil(self.factor * tokens * slots / total), total // self.ranks
        choice_EC = self._fill(routing, places)
        # One row and one weight more, for places that stay empty: zeros, which experts map to zeros.
        copies_ED = copy_rows(F.pad(x_TD, (0, 0, 0, 1)), choice_EC // slots)
        even = [held * places] * self.ranks
        route = Route(self.group, even, even, self.nodes)
        trip = Trip(*round_trip(route, kernels, self.traffic, "dispatch", forward=self.transport.dispatch))
        ticket = trip.depart(copies_ED)
        while_travelling()
        (x_MD,) = trip.arrive(ticket)
        blocks_SBL = self.slices.gather_counts(routing.counts_E.new_full((self.ranks, held), places))
        y_MD = self._compute(experts, x_MD, blocks_SBL, [sum(even)] * len(blocks_SBL), kernels)
        home = round_trip(route.back, kernels, self.traffic, "combine", backward=self.transport.gradient)
        (y_ED,) = travel(*home, y_MD)
        return weigh_rows(y_ED, F.pad(routing.weights_TK, (0, 0, 0, 1)), choice_EC)[:tokens]

    def _fill(self, routing: Routing, places: int) -> torch.Tensor:
        """Which copy, t·K + k, has each place, N where none: int64 [E · C]."""
        experts_N, counts_E = routing.experts_TK.flatten(), routing.counts_E
        copies = experts_N.shape[0]
        if not is_recomputing():
            self.traffic.add("dropped_tokens", (counts_E - places).clamp(min=0).sum())
        by_weight_N = routing.weights_TK.detach().flatten().argsort(descending=True, stable=True)
        copy_N = by_weight_N[experts_N[by_weight_N].argsort(stable=True)]
        expert_N = experts_N[copy_N]
        place_N = torch.arange(copies, device=expert_N.device) - (counts_E.cumsum(0) - counts_E)[expert_N]
        end = counts_E.shape[0] * places
        into_N = torch.where(place_N < places, expert_N * places + place_N, end)
        choice = experts_N.new_full((end + 1,), copies)
        return choice.scatter_(0, into_N, copy_N)[:end]
