"""`octofold rank-table`: writes the rank table of a job from a list of its servers, or checks one. Torch-free."""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.backends.rank_table import VARIABLE, RankTable, read
from octofold.backends.rank_table_writer import hosts_of, table_of

FILLING_POLL_S = 2.0


@dataclass(frozen=True)
class TableConfig:
    """The `rank_table` keys."""

    devices: int = 8
    """Of a server whose line names no addresses."""
    servers_per_super_pod: int = 0
    """0: no super pods, version 1.0; else version 1.2."""


@dataclass(frozen=True)
class TableJob:
    """The root of the `rank_table` keys."""

    rank_table: TableConfig = field(default_factory=TableConfig)


def run(argv: list[str]) -> int:
    """Print the table of the servers that a file (or -, standard input) lists; of a .json file, what it says.

    Raises:
        UserError: wrong arguments, or a table that HCCL would refuse.
    """
    if not argv or "=" in argv[0]:
        rule = "it takes a file that lists servers, or a table"
        raise UserError(f"rank-table\n  rule:   {rule}\n  remedy: octofold rank-table HOSTS > rank_table.json")
    name, *overrides = argv
    if name.endswith(".json"):
        print(described(read(Path(name))))
        return 0
    from octofold.launch.compose import apply, parse

    settings = apply(TableJob(), parse(overrides)).rank_table
    if not 1 <= settings.devices <= 64:
        raise ConfigError("rank_table.devices", settings.devices, "1 to 64 devices a server", "rank_table.devices=8")
    if settings.servers_per_super_pod < 0:
        key, value = "rank_table.servers_per_super_pod", settings.servers_per_super_pod
        raise ConfigError(key, value, "a number of servers; 0: no super pods", f"{key}=0")
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = "a text file that lists servers"
        raise UserError(f"{name}: {error}\n  rule:   {rule}\n  remedy: octofold rank-table --help") from error
    folder = Path() if name == "-" else Path(name).parent
    print(table_of(hosts_of(text, folder, settings.devices), settings.servers_per_super_pod), end="")
    return 0


def wait_until_filled(environ: Mapping[str, str], timeout_s: float) -> None:
    """Return once the table that RANK_TABLE_FILE names is more than the "initializing" that an operator begins with.

    Raises:
        UserError: it is not filled within the time; it may be in another attempt.
    """
    path = Path(environ.get(VARIABLE) or os.devnull)
    deadline_s = time.monotonic() + timeout_s
    told = False
    while _is_empty(path):
        if not told:
            print(f"octofold: waiting for {path}, which says that it is being filled", file=sys.stderr, flush=True)
            told = True
        if time.monotonic() > deadline_s:
            rule = f"the operator fills the rank table within launch.rendezvous.timeout_s={timeout_s:g}"
            remedy = "see Ascend Operator's log, and the label ring-controller.atlas of the job"
            error = UserError(f"{path}: status initializing\n  rule:   {rule}\n  remedy: {remedy}")
            error.status = 1
            raise error
        time.sleep(min(FILLING_POLL_S, timeout_s / 10))


def _is_empty(path: Path) -> bool:
    """Whether an operator has yet to fill the table. What else may be wrong with it, its readers tell."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("status") == "initializing"


def described(table: RankTable) -> str:
    """What a table says, in a line."""
    pods = {server.super_pod for server in table.servers} - {None}
    joined = f" in {len(pods)} super pod(s)" if pods else ""
    return f"version {table.version}: {table.ranks} rank(s) on {len(table.servers)} server(s){joined}"
