"""HCCL's rank tables: which rank stands on which device of which server, and which servers share a super pod.

HCCL reads such a JSON file where RANK_TABLE_FILE names one. Versions: 1.0 lists servers (Atlas A2, and A3 outside super
pods), 1.2 also super pods (A3), 2.0 ranks with their network layers (Ascend 950). Rules: "rank table configuration
resource information" of the HCCL user guide, CANN 9.1 (repository cann/hccl, docs; hiascend.com, hcclug_000063 to 68).
Version 1.1 (CPUs among the ranks) and tables without a version (first Ascend 910) are refused. Torch-free.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.backends.rank_table_entries import REMEDY, Entry, Server
from octofold.backends.rank_table_layers import servers_of_layers
from octofold.backends.rank_table_servers import servers_of_list

VARIABLE = "RANK_TABLE_FILE"
VERSIONS = ("1.0", "1.2", "2.0")


@dataclass(frozen=True)
class RankTable:
    """A checked table: ranks are 0 to N - 1, those of a server follow one another, so do the servers of a super pod."""

    place: str
    """Of the file, for errors."""
    version: str
    servers: tuple[Server, ...]
    """In the order of their ranks."""

    @property
    def ranks(self) -> int:
        """How many there are."""
        return sum(len(server.devices) for server in self.servers)

    def ranks_per_server(self) -> int:
        """Of each server.

        Raises:
            UserError: the servers are not of one size.
        """
        return self._one_size({server.name: len(server.devices) for server in self.servers}, "server")

    def ranks_per_super_pod(self) -> int:
        """Of each super pod; of each server where there are none.

        Raises:
            UserError: the super pods, or the servers, are not of one size.
        """
        per_server = self.ranks_per_server()
        ranks: dict[str, int] = {}
        for server in self.servers:
            if server.super_pod is not None:
                ranks[server.super_pod] = ranks.get(server.super_pod, 0) + len(server.devices)
        return self._one_size(ranks, "super pod") if ranks else per_server

    def _one_size(self, ranks: dict[str, int], what: str) -> int:
        first, size = next(iter(ranks.items()))
        for name, other in ranks.items():
            if other != size:
                shown = f"{self.place}: {what} {first} has {size} rank(s), {name} has {other}"
                rule = f"Octofold's layouts take every {what} to hold the same number of ranks"
                raise UserError(f"{shown}\n  rule:   {rule}\n  remedy: leave devices out of the table, or {what}s")
        return size


def read(path: Path) -> RankTable:
    """Read and check a file.

    Raises:
        UserError: it cannot be read, is no JSON, is of a version that is not read, or breaks a rule; with the entry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        remedy = f"set {VARIABLE} to a file that every rank can read, or unset it"
        raise UserError(f"{path}\n  rule:   a rank table that can be read: {why}\n  remedy: {remedy}") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> RankTable:
    """Check a table.

    Args:
        text: JSON.
        name: of its file, for errors.

    Raises:
        UserError: as `read`.
    """
    try:
        table = Entry(f"{name}: ", json.loads(text))
    except RecursionError as error:
        raise UserError(f"{name}\n  rule:   a rank table, not lists in lists\n  remedy: {REMEDY}") from error
    except json.JSONDecodeError as error:
        where = f"{name}: line {error.lineno}, column {error.colno}"
        rule = f"JSON, without comments: {error.msg}"
        raise UserError(f"{where}\n  rule:   {rule}\n  remedy: {REMEDY}") from error
    version = table.get("version")
    if version.value not in VERSIONS:
        rule = f"a version that is read: {', '.join(VERSIONS)} (1.1 is of clusters with CPUs among the ranks)"
        raise version.error(rule)
    status = table.find("status") if version.value == "2.0" else table.get("status")
    if status and status.value != "completed":
        raise status.error("completed: its writer (such as Ascend Operator) has finished", "wait for it")
    servers = servers_of_layers(table) if version.value == "2.0" else servers_of_list(table, version.value)
    return RankTable(name, version.value, tuple(servers))
