"""What communication costs: calls, bytes by class of link, and seconds, by group and collective.

Bytes are those that this rank sends. Where collectives may be done in several ways they are counted as the ring over
the group's ranks does them, which is what gloo and NCCL do with large tensors; n ranks, b bytes given by each:

    all_to_all, send, gather, scatter   b to their destinations, without this rank's own part
    all_gather                          (n - 1) b to the next rank
    reduce_scatter                      (n - 1) / n b to the next rank
    all_reduce                          2 (n - 1) / n b to the next rank
    broadcast, reduce                   b to the next rank, along a chain that begins or ends at the root
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from octofold.backends.collectives import all_gather_bytes
from octofold.backends.observing import Call, Told, group_name
from octofold.backends.topology import Topology


@dataclass
class Cost:
    """Of one collective over one group."""

    calls: int = 0
    sent_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By class of link (`topology.LINKS`); absent are those over which nothing went."""
    durations_s: list[float] = field(default_factory=list)
    """Of calls that are complete and whose time is known. Calls overlap with one another and with computation."""


@dataclass
class Accounting:
    """An observer (`observing.observed`) that adds up what calls cost since they were last taken."""

    topology: Topology
    _costs: dict[str, Cost] = field(default_factory=dict)
    _groups: dict[str, "_Group"] = field(default_factory=dict)

    def on_call(self, call: Call) -> Told:
        """Count a call."""
        group = self._groups.get(call.group.group_name)
        if group is None:
            ranks = dist.get_process_group_ranks(call.group)
            group = self._groups[call.group.group_name] = _Group(group_name(call.group), ranks, self.topology)
        cost = self._costs.setdefault(f"{group.name}/{call.op}", Cost())
        cost.calls += 1
        for peer, size_bytes in sent_bytes(call, call.group.rank(), len(group.ranks)).items():
            if size_bytes:
                cost.sent_bytes[group.links[peer]] += size_bytes
        # Told from other threads: appending is one step there, adding would be two.
        return cost.durations_s.append

    def take(self) -> dict[str, Cost]:
        """What was counted, by group and collective (`expert/all_to_all`); the count begins again."""
        taken, self._costs = self._costs, {}
        return taken


def over_ranks(costs: dict[str, Cost], steps: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Costs of a step, summed over all ranks, as plain values: calls, bytes by class of link, seconds where known.

    Collective over all ranks, which may have used different groups.

    Args:
        costs: this rank's, of `steps` steps.
        device: of the tensors that ranks exchange.
    """
    own = {
        name: (cost.calls, cost.sent_bytes, sum(cost.durations_s), len(cost.durations_s))
        for name, cost in costs.items()
    }
    summed: dict[str, dict[str, Any]] = {}
    for text in all_gather_bytes(json.dumps(own).encode(), device):
        for name, (calls, by_link, seconds, timed) in json.loads(text).items():
            total = summed.setdefault(name, {"calls": 0.0, "bytes": {}})
            total["calls"] += calls / steps
            for link, size in by_link.items():
                total["bytes"][link] = total["bytes"].get(link, 0.0) + size / steps
            if timed:
                total["seconds"] = total.get("seconds", 0.0) + seconds / steps
    return dict(sorted(summed.items()))


@dataclass
class _Group:
    name: str
    ranks: list[int]
    topology: Topology

    @cached_property
    def links(self) -> list[str]:
        """The class of link from this rank to each rank of the group."""
        own = dist.get_rank()
        return [self.topology.link(own, rank) for rank in self.ranks]


def sent_bytes(call: Call, own: int, ranks: int) -> dict[int, int]:
    """Bytes that rank `own` of `ranks` sends to others, by rank in the group (see the head of this file)."""
    given_bytes = sum(tensor.nbytes for tensor in call.inputs)
    following, others = (own + 1) % ranks, ranks - 1
    if ranks == 1 or call.op in ("barrier", "receive"):
        return {}
    if call.op == "send":
        assert call.peer is not None
        return {call.peer: given_bytes}
    if call.op == "all_to_all":
        return {rank: size for rank, size in enumerate(_parts_bytes(call, ranks)) if rank != own}
    if call.op == "scatter":
        # Only the root gives anything.
        return {rank: tensor.nbytes for rank, tensor in enumerate(call.inputs) if rank != own}
    if call.op == "gather":
        assert call.peer is not None
        return {} if own == call.peer else {call.peer: given_bytes}
    if call.op == "broadcast":
        return {} if following == call.peer else {following: given_bytes}
    if call.op == "reduce":
        return {} if own == call.peer else {following: given_bytes}
    factor = {"all_gather": ranks * others, "reduce_scatter": others, "all_reduce": 2 * others}[call.op]
    return {following: factor * given_bytes // ranks}


def _parts_bytes(call: Call, ranks: int) -> list[int]:
    """Of all_to_all: bytes for each rank."""
    if call.splits is None:
        return [tensor.nbytes for tensor in call.inputs]
    (rows,) = call.inputs
    if not call.splits:
        return [rows.nbytes // ranks] * ranks
    row_bytes = rows.nbytes // max(len(rows), 1)
    return [count * row_bytes for count in call.splits]
