"""How fast collectives are inside nodes and between them: timed on all ranks, before a job relies on it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from octofold.backends.collectives import all_gather_stack, all_reduce_sum, exchange_counts, share_timeout, world
from octofold.backends.topology import Topology

REPEATS = 3
MIB = 1 << 20


@dataclass(frozen=True)
class LinkTime:
    """One collective among the ranks of a node, or between two nodes."""

    nodes: tuple[int, ...]
    """One, or the two whose ranks took part."""
    link: str
    """The class of link between them (`topology.LINKS`)."""
    collective: str
    """all_reduce or all_to_all."""
    seconds: float
    """The fastest of three, on the slowest rank."""
    message_bytes: int
    """That each rank put in."""

    @property
    def bytes_per_s(self) -> float:
        """Of one rank's message."""
        return self.message_bytes / self.seconds


def measure_links(topology: Topology, device: torch.device, message_bytes: int) -> list[LinkTime]:
    """Time collectives in every node at once, then between each node and the next, in a ring. Collective.

    Every rank gets the same answer. Neighbours of even and odd numbers take turns, so that no link carries two at once.

    Args:
        message_bytes: of each rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = topology.ranks_per_node
    nodes = ranks // size
    members = [list(range(node * size, (node + 1) * size)) for node in range(nodes)]
    rounds: list[list[tuple[int, ...]]] = [[(node,) for node in range(nodes)]] if size > 1 else []
    pairs = sorted({(min(n, m), max(n, m)) for n in range(nodes) for m in [(n + 1) % nodes] if n != m})
    while pairs:
        # As many as share no node.
        turn: list[tuple[int, ...]] = []
        for pair in list(pairs):
            if not {node for taken in turn for node in taken} & set(pair):
                turn.append(pair)
                pairs.remove(pair)
        rounds.append(turn)
    found = []
    for turn in rounds:
        mine, times = None, (0.0, 0.0)
        for taken in turn:
            group = dist.new_group([rank for node in taken for rank in members[node]])
            if rank // size in taken:
                mine = group
        if mine is not None:
            share_timeout(mine)
            times = (_time(_all_reduce(mine, device, message_bytes)), _time(_all_to_all(mine, device, message_bytes)))
        told = torch.tensor(times, dtype=torch.float32, device=device).view(1, -1)
        slowest = all_gather_stack(told, world()).view(nodes, size, 2).amax(1).tolist()
        for taken in turn:
            for number, collective in enumerate(("all_reduce", "all_to_all")):
                seconds = max(slowest[node][number] for node in taken)
                link = topology.link(members[taken[0]][0], members[taken[-1]][-1])
                found.append(LinkTime(taken, link, collective, seconds, message_bytes))
        if mine is not None:
            dist.destroy_process_group(mine)
    return found


def slow_nodes(times: list[LinkTime], factor: float) -> dict[int, float]:
    """Nodes whose times are beyond `factor` times what is usual of their kind, and how many times that they take.

    A kind is one collective over one class of link. Usual is what the fastest third of the links does not exceed.

    Between two nodes a slow link is held against the one that is slow with all its neighbours; of two nodes alone that
    cannot be told, and of a single slow link neither: then both are named.
    """
    found: dict[int, float] = {}
    for collective in ("all_reduce", "all_to_all"):
        for link in dict.fromkeys(each.link for each in times):
            kind = [each for each in times if (each.link, each.collective) == (link, collective)]
            seconds = sorted(each.seconds for each in kind)
            if len(kind) < 3:
                continue
            # Not the median: a slow node takes part in two links of a ring, which are most of them where it has three.
            usual = seconds[(len(seconds) - 1) // 3]
            slow = [each for each in kind if each.seconds > factor * usual]
            shared = set.intersection(*(set(each.nodes) for each in slow)) if slow else set()
            for each in slow:
                for node in shared or each.nodes:
                    found[node] = max(found.get(node, 0.0), each.seconds / usual)
    return found


def weak_links(times: list[LinkTime], least_gb_s: Mapping[str, float]) -> list[LinkTime]:
    """Those over which a rank sends less than is asked of their class.

    Args:
        least_gb_s: class of link -> 10^9 bytes a second of one rank's message.
    """
    return [each for each in times if each.bytes_per_s < 1e9 * least_gb_s.get(each.link, 0.0)]


def _time(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs; the first, which connects, does not count."""
    work()
    took = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        took.append(time.perf_counter() - began_s)
    return min(took)


def _all_reduce(group: dist.ProcessGroup, device: torch.device, message_bytes: int) -> Callable[[], object]:
    values = torch.ones(message_bytes // 4, dtype=torch.float32, device=device)
    # Reading a number waits for the device.
    return lambda: float(all_reduce_sum(values, group)[0])


def _all_to_all(group: dist.ProcessGroup, device: torch.device, message_bytes: int) -> Callable[[], object]:
    ranks = dist.get_world_size(group)
    rows = torch.ones(ranks, max(1, message_bytes // 8 // ranks), dtype=torch.int64, device=device)
    return lambda: int(exchange_counts(rows, group)[0, 0])
