"""Sums over all ranks in steps that follow their links: inside each node, between nodes, inside each node again.

Between nodes every rank then sends 2 (nodes - 1) / nodes of its own part, a share of the whole that is as small as the
node is large, and all ranks of a node send at once. For the sums of the trainer; gradients are summed by FSDP2, whose
replicas (parallel.data_replicate) do the same when shards stay inside a node.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from octofold.backends.collectives import (
    Group,
    all_gather_stack,
    all_reduce_sum,
    reduce_scatter_stack,
    share_timeout,
    sums,
    world,
)
from octofold.backends.errors import ConfigError
from octofold.backends.topology import Topology


@contextmanager
def sums_taken(name: str, topology: Topology) -> Iterator[None]:
    """Take sums over the world (`collectives.all_reduce_sum`) in this way inside the context. Collective.

    Args:
        name: flat or hierarchical.

    Raises:
        ConfigError: see `HierarchicalSum`.
    """
    if name == "hierarchical":
        sums[world()] = HierarchicalSum(topology)
    try:
        yield
    finally:
        sums.pop(world(), None)


class HierarchicalSum:
    """Reduce-scatter in the node, all-reduce among ranks with the same place in their nodes, all-gather in the node.

    Equal to a flat sum but for the order of additions.
    """

    def __init__(self, topology: Topology) -> None:
        """Make the groups that it takes. Collective: every rank calls it.

        Raises:
            ConfigError: one node has more ranks than another.
        """
        nodes = topology.by_node(range(dist.get_world_size()))
        if len({len(ranks) for ranks in nodes.values()}) > 1:
            shown = ", ".join(f"{len(ranks)} rank(s) in node {node}" for node, ranks in nodes.items())
            rule = f"a hierarchical sum needs as many ranks in each node; found {shown}"
            raise ConfigError("backend.all_reduce", "hierarchical", rule, "backend.all_reduce=flat")
        self.in_node = _own_group(list(nodes.values()), "world_in_node")
        self.across = _own_group([list(ranks) for ranks in zip(*nodes.values(), strict=True)], "world_across_nodes")

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values`, of any shape, over the world, in place, and return it."""
        ranks = self.in_node.size()
        flat = values.flatten()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % ranks))
        part = all_reduce_sum(reduce_scatter_stack(padded.view(ranks, -1), self.in_node), self.across)
        values.copy_(all_gather_stack(part, self.in_node).flatten()[: flat.numel()].view_as(values))
        return values


def _own_group(members: list[list[int]], name: str) -> Group:
    """Of groups that together hold every rank, that of this rank.

    Every rank takes part in making all of them. torch can make a group among its members alone, but names it by how
    many groups a rank belongs to: where that differs between members, they wait for one another for ever.
    """
    own = None
    for ranks in members:
        group = dist.new_group(ranks, group_desc=name)
        own = group if dist.get_rank() in ranks else own
    assert isinstance(own, Group)
    share_timeout(own)
    return own
