"""Which ranks stand close together: nodes, supernodes, and the class of link between two ranks.

Ranks are numbered node by node: torchrun does so, and Slurm's block distribution. A *node* is a chassis, whose devices
share the fastest links; a *supernode* is a set of nodes that share one fast plane (up to 384 packages of Ascend 910C);
between supernodes lies the *network*. Where there are no supernodes, the network lies between nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo
from octofold.backends.rank_table import VARIABLE, RankTable
from octofold.backends.rank_table import read as read_rank_table

LINKS = ("local", "node", "supernode", "network")
"""Classes of links, nearest first: inside a rank's own memory, a node, a supernode, and beyond."""


@dataclass(frozen=True)
class Topology:
    """Where the ranks of a job stand. Ranks are global ones."""

    ranks_per_node: int
    ranks_per_supernode: int
    """A multiple of `ranks_per_node`; equal to it where there are no supernodes."""

    def __post_init__(self) -> None:
        assert self.ranks_per_node >= 1, self
        assert self.ranks_per_supernode % self.ranks_per_node == 0, self

    @staticmethod
    def read(config: BackendConfig, info: RankInfo, rank_table: Path | None = None) -> "Topology":
        """From the configuration; where that is silent from the rank table, or else the environment of `info`.

        Args:
            rank_table: HCCL's, which also tells super pods.

        Raises:
            UserError: the environment's nodes are not of one size, or not numbered one after the other; the table
                is not valid, or tells of another job.
        """
        if config.ranks_per_node:
            return Topology(config.ranks_per_node, config.ranks_per_supernode or config.ranks_per_node)
        _check_environment(info)
        if rank_table is None or info.world_size == 1:
            return Topology(info.local_world_size, info.local_world_size)
        table = read_rank_table(rank_table)
        _check_table(table, info)
        return Topology(table.ranks_per_server(), table.ranks_per_super_pod())

    def node(self, rank: int) -> int:
        """Number of the rank's node."""
        return rank // self.ranks_per_node

    def supernode(self, rank: int) -> int:
        """Number of the rank's supernode."""
        return rank // self.ranks_per_supernode

    def link(self, rank: int, other: int) -> str:
        """The class of link between two ranks, one of `LINKS`."""
        if rank == other:
            return "local"
        if self.node(rank) == self.node(other):
            return "node"
        return "supernode" if self.supernode(rank) == self.supernode(other) else "network"

    def by_node(self, ranks: Sequence[int]) -> dict[int, list[int]]:
        """Node -> its ranks among `ranks`, both in the order of `ranks`.

        Args:
            ranks: of a process group, for instance (`torch.distributed.get_process_group_ranks`).
        """
        nodes: dict[int, list[int]] = {}
        for rank in ranks:
            nodes.setdefault(self.node(rank), []).append(rank)
        return nodes


def _check_table(table: RankTable, info: RankInfo) -> None:
    """The table tells of this job: as many ranks, on nodes of the launcher's size."""
    remedy = f"write the table of this job, unset {VARIABLE}, or set backend.ranks_per_node"
    if table.ranks != info.world_size:
        shown = f"WORLD_SIZE={info.world_size} {VARIABLE}={table.place} ({table.ranks} ranks)"
        raise ConfigError(VARIABLE, shown, "the rank table lists every rank of the job", remedy)
    per_server = table.ranks_per_server()
    if per_server != info.local_world_size:
        shown = f"LOCAL_WORLD_SIZE={info.local_world_size} {VARIABLE}={table.place} ({per_server} ranks a server)"
        raise ConfigError(VARIABLE, shown, "the launcher and the rank table mean the same servers", remedy)


def _check_environment(info: RankInfo) -> None:
    """Every rank checks its own: a node that differs is found by its own ranks."""
    remedy = "mend the launcher's settings, or set backend.ranks_per_node"
    if info.world_size % info.local_world_size:
        shown = f"WORLD_SIZE={info.world_size} LOCAL_WORLD_SIZE={info.local_world_size}"
        raise ConfigError("LOCAL_WORLD_SIZE", shown, "every node has the same number of ranks", remedy)
    if info.rank % info.local_world_size != info.local_rank:
        shown = f"RANK={info.rank} LOCAL_RANK={info.local_rank} LOCAL_WORLD_SIZE={info.local_world_size}"
        raise ConfigError("LOCAL_RANK", shown, "ranks are numbered node by node", remedy)
