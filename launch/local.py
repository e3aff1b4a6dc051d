"""How ranks come to be: joined where a launcher has started this process as one, else started here by torch's agent."""

import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octofold.backends.errors import UserError
from octofold.launch.config import LaunchConfig
from octofold.launch.failures import clear_notes
from octofold.train.history import append
from octofold.train.stop import exit_status

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server import RunResult

    from octofold.launch.agent import RankAgent


@dataclass(frozen=True)
class Joined:
    """This process's place in a job that another launcher started."""

    rank: int
    world_size: int
    job_id: str | None
    """The same on every rank and different for every job; None where the launcher gives none."""


def join(environ: MutableMapping[str, str]) -> Joined | None:
    """The place that the environment gives this process, or None where no launcher has started it.

    torchrun's variables count first. Slurm's are translated into them, in `environ`.

    Raises:
        UserError: a variable is missing or is no number, or the rank lies outside the world.
    """
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
        if "SLURM_PROCID" not in environ or tasks == "1":
            return None
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], tasks
        environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
        if tasks:
            environ["LOCAL_WORLD_SIZE"] = str(tasks_of_node(tasks, int(environ.get("SLURM_NODEID", "0"))))
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", environ.get("SLURM_JOB_NODELIST")))
        if nodes:
            environ.setdefault("MASTER_ADDR", first_host(nodes))
        if environ.get("SLURM_JOB_ID", "").isdigit():
            # Below the ephemeral ports, and different for jobs that share a node.
            environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 10000))
    # Launchers of one process a node leave it out.
    if "LOCAL_RANK" not in environ:
        environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = "0", "1"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        rule = "a launcher that sets RANK and WORLD_SIZE also says where rank 0 listens"
        raise _environment_error(f"{', '.join(missing)} not set", rule, "set them, or unset RANK and WORLD_SIZE")
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _number(environ, "LOCAL_RANK"), _number(environ, "MASTER_PORT")
    if not rank < world_size:
        rule = "ranks are 0 to WORLD_SIZE - 1"
        raise _environment_error(f"RANK={rank} WORLD_SIZE={world_size}", rule, "mend the launcher's settings")
    ids = (environ.get("TORCHELASTIC_RUN_ID"), environ.get("SLURM_JOB_ID"))
    return Joined(rank, world_size, next((job_id for job_id in ids if job_id not in (None, "", "none")), None))


def _number(environ: MutableMapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise _environment_error(f"{name}={environ[name]}", "a whole number", "mend the launcher's settings")
    return int(environ[name])


def _environment_error(shown: str, rule: str, remedy: str) -> UserError:
    return UserError(f"environment: {shown}\n  rule:   {rule}\n  remedy: {remedy}")


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, such as node003 of node[003-005,7],other."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_of_node(tasks: str, node: int) -> int:
    """How many tasks run on a node, from Slurm's list for all nodes, such as 8(x3),4."""
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[node]


@dataclass(frozen=True)
class Ended:
    """How a job's processes ended."""

    status: int
    """0; 1 for a failure, 2 for a user's mistake (both told on stderr); 128 + signal: interrupted by a person, or not
    saved in time. 0 after a scheduler's signal once all is saved."""
    stopped_by: int | None = None
    """The signal that ended it before its last step."""


def start_ranks(launch: LaunchConfig, run_dir: Path) -> Ended:
    """Start `launch.nproc_per_node` ranks of the run in `run_dir` and stay until all have ended.

    Signals are passed on; ranks then finish their step and save. Ranks that outlive `launch.stop_deadline_s`, or the
    second signal, are killed. When one fails, all are ended and started again, `launch.max_restarts` times, to go on
    from the newest valid checkpoint; not after a user's mistake, or the same exception again. Ranks never outlive this
    process.
    """
    from octofold.launch.agent import RankAgent

    (run_dir / "logs").mkdir(exist_ok=True)
    clear_notes(run_dir / "logs")
    agent = RankAgent(launch, run_dir)
    with rank_environment(launch.nproc_per_node), agent.handling_signals():
        result = agent.run()
    return ended_with(agent, result)


def note_end(run_dir: Path, ended: Ended) -> None:
    """Enter into the run's history that the command which started its ranks is about to end."""
    with suppress(OSError):  # a full disk; the exit status says it, too
        append(run_dir, "end", status=ended.status, signal=ended.stopped_by)


def ended_with(agent: "RankAgent", result: "RunResult") -> Ended:
    """Tell on stderr what ended an agent's ranks, and how this process is to end."""
    if agent.killed_why:
        print(f"octofold: {agent.killed_why}; the newest complete checkpoint stands", file=sys.stderr)
    if agent.failure and result.is_failed():
        print(f"octofold: {agent.failure.message}", file=sys.stderr)
    if agent.stopped_by is not None:
        unsaved = result.is_failed() or agent.killed_why
        return Ended(128 + agent.stopped_by if unsaved else exit_status(agent.stopped_by), agent.stopped_by)
    return Ended(agent.failure.status if agent.failure and result.is_failed() else 0)


@contextmanager
def rank_environment(ranks: int) -> Iterator[None]:
    """Variables that the agent reads or hands to the ranks, set while they start and run."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    # The agent takes at least one signal for itself; the usual ones are handled by `RankAgent`.
    added = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT", "OMP_NUM_THREADS": str(threads)}
    added = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
