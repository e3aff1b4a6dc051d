"""The two-stage route: a token crosses the slow link once for each node that holds some of its experts.

stage 1   to a *relay* on each such node (the rank in the same place, so that a node's ranks share its link), and from
          there
stage 2   inside the node, once to each rank that holds some of the token's experts, with the gate's choice and weights

Back: each rank sums its experts' outputs times their weights, the relay sums over its node's ranks, the token's own
rank over nodes, each in the order of ranks. So a row crosses the slow link once there and once back, and gradients
likewise: those of outputs spread as tokens do, those of tokens and of weights are summed as outputs are.

With choices limited to M nodes (DeepSeek-V3, section 2.1.2) a token crosses at most M times instead of K. Nodes may
have different numbers of ranks. One host synchronisation a layer, for the sizes of both stages.

T tokens, K experts a token, E experts in all, R ranks, P nodes, D width, N rows at a relay, M rows at the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from octofold.backends.collectives import Group, PendingRows, all_gather_stack
from octofold.kernels.qtensor import Format
from octofold.kernels.registry import Kernels
from octofold.parallel.expert import ExchangedExperts, Experts, Routing, read_counts
from octofold.parallel.expert_rows import indices_of, sum_rows
from octofold.parallel.expert_slices import WholeExperts
from octofold.parallel.passage import Tensors, Trip, travel
from octofold.parallel.transport import Packing, Route, send


class Relays:
    """Which rank of each node passes on whose tokens. Ranks are those of the group."""

    def __init__(self, nodes: tuple[int, ...], own: int) -> None:
        """
        Args:
            nodes: the node of each rank, in ascending order.
            own: this rank.
        """
        assert list(nodes) == sorted(nodes), f"ranks of a node are neighbours in a group, got nodes {nodes}"
        numbers = sorted(set(nodes))
        self.members = [[rank for rank, node in enumerate(nodes) if node == number] for number in numbers]
        self.node_of = [numbers.index(node) for node in nodes]
        self.own, self.node = own, self.node_of[own]
        self.peers = self.members[self.node]
        """The ranks of this node."""
        self.relays = [self.relay(own, node) for node in range(len(numbers))]
        """This rank's relay on each node."""
        self.of_source = [self.relay(source, self.node) for source in range(len(nodes))]
        """Each rank's relay on this node."""
        self.on = cache(self._on)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`node_of`, `relays` and `of_source` on a device, copied there once."""
        node_of, relays, of_source = (
            torch.tensor(ranks, device=device) for ranks in (self.node_of, self.relays, self.of_source)
        )
        return node_of, relays, of_source

    def relay(self, source: int, node: int) -> int:
        """The rank of `node` that passes on what `source` sends there; on its own node, itself."""
        place = self.members[self.node_of[source]].index(source)
        return self.members[node][place % len(self.members[node])]


@dataclass(frozen=True)
class Hop:
    """One stage of one layer's exchange."""

    route: Route
    from_C: torch.Tensor
    """Which row each copy that leaves is of."""
    rows: int
    """That there are."""


@dataclass
class Hops:
    """Both stages; the second is known once the choices have arrived at the relay."""

    first: Hop
    inside: Route
    second: Hop | None = None


class TwoStageExperts(ExchangedExperts):
    """Ranks inside a node are reached through its relays (module docstring)."""

    def __init__(
        self,
        group: Group,
        *,
        nodes: tuple[int, ...] = (),
        overlap: bool = True,
        slices: WholeExperts | None = None,
    ) -> None:
        super().__init__(group, nodes=nodes or (0,) * group.size(), overlap=overlap, slices=slices)
        self.places = Relays(self.nodes, group.rank())

    def _run(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        routing: Routing,
        kernels: Kernels,
        while_travelling: Callable[[], None],
    ) -> torch.Tensor:
        hops, blocks_SBL, copies_S = self._plan(routing)
        held = routing.counts_E.shape[0] // self.ranks
        outward = Outward(self, hops, kernels, "dispatch", self.transport.dispatch, routing.experts_TK, held)
        trip = Trip(outward, Homeward(self, hops, kernels, "dispatch_gradient"))
        ticket = trip.depart(x_TD, routing.weights_TK)
        while_travelling()
        x_MD, weights_MK = trip.arrive(ticket)
        own_MK = outward.arrived_MK - self.group.rank() * held
        own_MK = own_MK.where((own_MK >= 0) & (own_MK < held), held)
        y_MD = self._compute_choices(experts, x_MD, own_MK, weights_MK, blocks_SBL, copies_S, kernels)
        homeward = Homeward(self, hops, kernels, "combine")
        gradient = Outward(self, hops, kernels, "combine_gradient", self.transport.gradient)
        return travel(homeward, gradient, y_MD)[0]

    def _plan(self, routing: Routing) -> tuple[Hops, torch.Tensor, list[int]]:
        """Sizes of both stages; copies for each expert on the ranks of this one's slices, and their sums."""
        places, ranks, own = self.places, self.ranks, self.group.rank()
        held, tokens = routing.counts_E.shape[0] // ranks, routing.experts_TK.shape[0]
        node_R, relay_P, relay_R = places.on(routing.experts_TK.device)
        rank_TK = routing.experts_TK // held
        goes_TR = _any_of(rank_TK, ranks)
        goes_TP = _any_of(node_R[rank_TK], len(places.members))
        counted = torch.cat([goes_TP.sum(0), goes_TR.sum(0), routing.counts_E])
        nodes_RP, ranks_RR, counts_RE = all_gather_stack(counted, self.group).split(
            [len(places.members), ranks, ranks * held], dim=1
        )
        mine_R, here_R = relay_R == own, node_R == places.node
        blocks_SBL = self.slices.gather_counts(counts_RE[:, own * held : (own + 1) * held].sum(0, keepdim=True))
        to_relays, from_sources, to_peers, from_relays, copies_S = read_counts(
            nodes_RP.new_zeros(ranks).index_copy(0, relay_P, nodes_RP[own]),
            nodes_RP[:, places.node] * mine_R,
            (ranks_RR * mine_R[:, None]).sum(0) * here_R,
            nodes_RP.new_zeros(ranks).index_add(0, relay_R, ranks_RR[:, own]),
            blocks_SBL.sum((1, 2)),
        )
        # By node, then token: the blocks of the relays one after the other.
        from_C = indices_of(goes_TP.t(), sum(to_relays)) % max(tokens, 1)
        first = Hop(Route(self.group, to_relays, from_sources, self.nodes), from_C, tokens)
        return Hops(first, Route(self.group, to_peers, from_relays, self.nodes)), blocks_SBL, copies_S

    def second_hop(self, experts_NK: torch.Tensor, held: int, inside: Route) -> Hop:
        """Which of the rows that arrived at this relay go to which rank of its node."""
        rows = experts_NK.shape[0]
        goes_NR = _any_of(experts_NK // held, self.ranks)[:, self.places.peers[0] : self.places.peers[-1] + 1]
        return Hop(inside, indices_of(goes_NR.t(), sum(inside.send_counts)) % max(rows, 1), rows)


class Outward:
    """A passage: rows of tokens to the ranks of their experts, through relays, in one format all the way."""

    def __init__(
        self,
        route: TwoStageExperts,
        hops: Hops,
        kernels: Kernels,
        purpose: str,
        format: Format | None,
        experts_TK: torch.Tensor | None = None,
        held: int = 0,
    ) -> None:
        """
        Args:
            experts_TK: travel with the rows and tell the relays where to; None: the relays know.
            held: experts on each rank.
        """
        self.route, self.hops, self.kernels, self.purpose, self.format = route, hops, kernels, purpose, format
        self.experts_TK, self.held = experts_TK, held
        self.arrived_MK = torch.empty(0)

    def begin(self, tensors: Tensors) -> tuple[Packing, PendingRows]:
        if self.experts_TK is not None:
            tensors = *tensors, self.experts_TK.to(torch.int32)
        packing, hop = Packing(tensors, self.kernels, self.format), self.hops.first
        parcels = packing.pack(tensors).index_select(0, hop.from_C)
        return packing, send(parcels, hop.route, self.route.traffic, self.purpose)

    def end(self, pending: tuple[Packing, PendingRows]) -> Tensors:
        packing, arriving = pending
        parcels = arriving.wait()
        if self.hops.second is None:
            # Only the choices are read here: the last bytes of each parcel.
            slots, dtype = packing.columns[-1]
            choices = parcels[:, -slots * dtype.itemsize :].contiguous().view(dtype)
            self.hops.second = self.route.second_hop(choices, self.held, self.hops.inside)
        hop = self.hops.second
        arriving = send(parcels.index_select(0, hop.from_C), hop.route, self.route.traffic, self.purpose)
        tensors = packing.unpack(arriving.wait())
        if self.experts_TK is not None:
            self.arrived_MK = tensors[-1].long()
            tensors = tensors[:-1]
        return tensors


class Homeward:
    """The transpose: rows back to the tokens they are of, summed at the relay and at the token's own rank."""

    def __init__(self, route: TwoStageExperts, hops: Hops, kernels: Kernels, purpose: str) -> None:
        self.route, self.hops, self.kernels, self.purpose = route, hops, kernels, purpose

    def begin(self, tensors: Tensors) -> tuple[Packing, PendingRows]:
        assert self.hops.second is not None, "nothing has gone outward"
        packing, traffic = Packing(tensors, self.kernels), self.route.traffic
        arrived = send(packing.pack(tensors), self.hops.second.route.back, traffic, self.purpose).wait()
        tensors = _summed(packing.unpack(arrived), self.hops.second)
        return packing, send(packing.pack(tensors), self.hops.first.route.back, traffic, self.purpose)

    def end(self, pending: tuple[Packing, PendingRows]) -> Tensors:
        packing, arriving = pending
        return _summed(packing.unpack(arriving.wait()), self.hops.first)


def _summed(tensors: Tensors, hop: Hop) -> Tensors:
    return tuple(sum_rows(tensor, hop.from_C, hop.rows) for tensor in tensors)


def _any_of(of_TK: torch.Tensor, size: int) -> torch.Tensor:
    """bool [T, size]: whether any of a row's K numbers is this one."""
    return torch.zeros(of_TK.shape[0], size, dtype=torch.bool, device=of_TK.device).scatter_(1, of_TK.long(), True)
