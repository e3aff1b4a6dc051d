"""`octofold doctor`: the job's environment: ranks, devices a node, the rank table, HCCL's variables."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from octofold.backends import rank_table
from octofold.backends.errors import UserError
from octofold.launch.doctor_ascend import split
from octofold.launch.doctor_finding import FAIL, WARN, Check, Finding, Problem, Surroundings, ok
from octofold.launch.doctor_matrix import HCCL_NUMBERS, HCCL_OTHERS, HCCL_WORDS
from octofold.launch.local import join
from octofold.launch.rank_table import described

BAD_RANKS = Problem(FAIL, "{error}", "{remedy}")
MANY_RANKS = Problem(
    FAIL,
    "LOCAL_WORLD_SIZE={ranks}, and torch sees {devices} device(s)",
    "start as many ranks as devices, or show more devices",
)


def check_ranks(here: Surroundings) -> Iterator[Finding]:
    environ = dict(here.environ)
    try:
        joined = join(environ)
    except UserError as error:
        yield split(BAD_RANKS, error)
        return
    if joined is None:
        yield ok("no launcher has started this process")
        return
    devices = here.torch.devices("npu") or here.torch.devices("cuda")
    local = environ.get("LOCAL_WORLD_SIZE", "1")
    if devices and local.isdigit() and int(local) > len(devices):
        yield MANY_RANKS.found(ranks=local, devices=len(devices))
    else:
        yield ok(f"rank {joined.rank} of {joined.world_size}")


BAD_TABLE = Problem(FAIL, "{error}", "{remedy}")
OTHER_JOB = Problem(
    FAIL,
    "{path} lists {ranks} ranks, and WORLD_SIZE={world_size}",
    "octofold rank-table HOSTS > {path}, or unset RANK_TABLE_FILE",
)


def check_rank_table(here: Surroundings) -> Iterator[Finding]:
    named = here.environ.get(rank_table.VARIABLE)
    if not named:
        yield ok(f"{rank_table.VARIABLE} is not set")
        return
    try:
        table = rank_table.read(Path(named))
        table.ranks_per_super_pod()
    except UserError as error:
        yield split(BAD_TABLE, error)
        return
    world_size = here.environ.get("WORLD_SIZE", str(table.ranks))
    if world_size not in ("1", str(table.ranks)):
        yield OTHER_JOB.found(path=named, ranks=table.ranks, world_size=world_size)
    else:
        yield ok(f"{named}: {described(table)}")


BAD_VALUE = Problem(FAIL, "{name}={value} is not {rule}", "set {name} to {rule}, or unset it")
UNKNOWN = Problem(WARN, "{name} is no variable of HCCL that is known here", "did you mean {near}? Else ignore this")
NO_WHITELIST = Problem(
    FAIL,
    "HCCL_WHITELIST_DISABLE=0, and HCCL_WHITELIST_FILE names no file",
    "HCCL_WHITELIST_DISABLE=1, or name the file",
)


def check_hccl(here: Surroundings) -> Iterator[Finding]:
    said = {name: value for name, value in here.environ.items() if name.startswith("HCCL_")}
    found = []
    for name, value in sorted(said.items()):
        if name in HCCL_NUMBERS:
            least, most = HCCL_NUMBERS[name]
            if not re.fullmatch(r"\d+", value) or not least <= int(value) <= most:
                found.append(BAD_VALUE.found(name=name, value=value, rule=f"a whole number from {least} to {most}"))
        elif name in HCCL_WORDS:
            if value.lower() not in map(str.lower, HCCL_WORDS[name]):
                found.append(BAD_VALUE.found(name=name, value=value, rule=" or ".join(HCCL_WORDS[name])))
        elif name not in HCCL_OTHERS:
            known = [*HCCL_NUMBERS, *HCCL_WORDS, *HCCL_OTHERS]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            found.append(UNKNOWN.found(name=name, near=near))
    listed = Path(said.get("HCCL_WHITELIST_FILE", "")).is_file()
    if said.get("HCCL_WHITELIST_DISABLE") == "0" and not listed:
        found.append(NO_WHITELIST.found())
    yield from found or [ok(", ".join(f"{name}={value}" for name, value in sorted(said.items())) or "nothing is set")]


CHECKS = (
    Check(
        "ranks",
        "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (or Slurm's), against the devices here",
        check_ranks,
        (BAD_RANKS, MANY_RANKS),
    ),
    Check(
        "rank table", "the file that RANK_TABLE_FILE names, against the job", check_rank_table, (BAD_TABLE, OTHER_JOB)
    ),
    Check("hccl", "names and values of HCCL_*", check_hccl, (BAD_VALUE, UNKNOWN, NO_WHITELIST)),
)
