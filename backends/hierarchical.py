"""Sums over a group in steps that follow its links: inside each node, between nodes, inside each node again.

Between nodes every rank then sends 2 (nodes - 1) / nodes of its own part, a share of the whole that is as small as the
node is large, and all ranks of a node send at once. For the sums of the trainer; gradients are summed by FSDP2, whose
replicas (parallel.data_replicate) do the same when shards stay inside a node.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from octofold.backends.collectives import Group, all_gather_stack, all_reduce_sum, reduce_scatter_stack, sums
from octofold.backends.errors import ConfigError
from octofold.backends.observing import group_name
from octofold.backends.topology import Topology


@contextmanager
def sums_taken(name: str, group: Group, topology: Topology) -> Iterator[None]:
    """Take sums over a group (`collectives.all_reduce_sum`) in this way inside the context. Collective over the group.

    Args:
        name: flat or hierarchical.

    Raises:
        ConfigError: see `HierarchicalSum`.
    """
    if name == "hierarchical":
        sums[group] = HierarchicalSum(group, topology)
    try:
        yield
    finally:
        sums.pop(group, None)


class HierarchicalSum:
    """Reduce-scatter in the node, all-reduce among ranks with the same place in their nodes, all-gather in the node.

    Equal to a flat sum but for the order of additions.
    """

    def __init__(self, group: Group, topology: Topology) -> None:
        """Make the groups that it takes. Collective: every rank of `group` calls it.

        Raises:
            ConfigError: the group has more ranks in one node than in another.
        """
        nodes = topology.by_node(dist.get_process_group_ranks(group))
        if len({len(ranks) for ranks in nodes.values()}) > 1:
            shown = ", ".join(f"{len(ranks)} rank(s) in node {node}" for node, ranks in nodes.items())
            rule = f"a hierarchical sum over {group_name(group)} needs as many ranks in each node; found {shown}"
            raise ConfigError("backend.all_reduce", "hierarchical", rule, "backend.all_reduce=flat")
        own = nodes[topology.node(dist.get_rank())]
        place = own.index(dist.get_rank())
        self.in_node = _subgroup(group, own, "in_node")
        self.across = _subgroup(group, [ranks[place] for ranks in nodes.values()], "across_nodes")

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values`, of any shape, over the group, in place, and return it."""
        ranks = self.in_node.size()
        flat = values.flatten()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % ranks))
        part = all_reduce_sum(reduce_scatter_stack(padded.view(ranks, -1), self.in_node), self.across)
        values.copy_(all_gather_stack(part, self.in_node).flatten()[: flat.numel()].view_as(values))
        return values


def _subgroup(group: Group, ranks: list[int], name: str) -> Group:
    subgroup = dist.new_group(ranks, use_local_synchronization=True, group_desc=f"{group_name(group)}_{name}")
    assert isinstance(subgroup, Group)
    return subgroup
