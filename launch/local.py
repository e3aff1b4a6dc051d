"""How ranks come to be: joined where a launcher has started this process as one, else started here by torch's agent."""

import json
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from octofold.backends.errors import UserError
from octofold.launch.config import LaunchConfig

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

LOG_LINES_SHOWN = 15


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


def start_ranks(launch: LaunchConfig, run_dir: Path) -> int:
    """Start `launch.nproc_per_node` ranks of the run in `run_dir` and stay until all have ended.

    SIGINT and SIGTERM are passed on; ranks then finish their step and save. Ranks that outlive
    `launch.stop_deadline_s`, or the second signal, are killed. Ranks never outlive this process.

    Returns:
        The exit status: 0, 1 for a failure (told on stderr), 2 for a user's mistake, 128 + signal when interrupted.
    """
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    for stale in logs.glob("failure_rank_*.json"):
        stale.unlink()
    agent = _make_agent(launch, run_dir)
    stop = _Stop(agent, launch.stop_deadline_s)
    with _rank_environment(launch.nproc_per_node), stop.installed():
        result = agent.run()
    if stop.killed_ranks:
        print(f"octofold: {stop.killed_ranks}; the newest complete checkpoint stands", file=sys.stderr)
    failure = _first_failure(logs, result.failures, stop.signum is not None)
    if failure:
        print(f"octofold: {failure[1]}", file=sys.stderr)
    if stop.signum is not None:
        return 128 + stop.signum
    return failure[0] if failure else 0


@contextmanager
def _rank_environment(ranks: int) -> Iterator[None]:
    """Variables that the agent reads or hands to the ranks, set while they start and run."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    # The agent takes at least one signal for itself; the usual ones are `_Stop`'s.
    added = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT", "OMP_NUM_THREADS": str(threads)}
    added = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _make_agent(launch: LaunchConfig, run_dir: Path) -> "LocalElasticAgent":
    """torchrun's agent for one node, with the ranks' output left as it is."""
    import uuid

    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    # Its lines repeat, with tracebacks, what is told at the end in one place.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, local_addr="localhost")
    # The agent substitutes ${local_rank} in arguments; a dollar in a path must survive that.
    path = str(run_dir).replace("$", "$$")
    spec = WorkerSpec(
        role="rank",
        local_world_size=launch.nproc_per_node,
        rdzv_handler=registry.get_rendezvous_handler(rendezvous),
        entrypoint=sys.executable,
        args=("-P", "-m", "octofold.launch.worker", path, os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="localhost",
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(os.devnull), shutdown_timeout=math.ceil(launch.stop_deadline_s))


class _Stop:
    """Passes a signal on to the ranks, and kills them when they outstay the deadline or a second signal comes."""

    def __init__(self, agent: "LocalElasticAgent", deadline_s: float) -> None:
        self.signum: int | None = None
        self.killed_ranks = ""
        self._agent, self._deadline_s = agent, deadline_s

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and (as SIGTERM; unless nohup ignores it) SIGHUP while the context lasts."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) is not signal.SIG_IGN}
        for signum in before:
            signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if not self._pids():
            sys.exit(128 + signum)
        if self.signum is not None:
            self._kill("ranks killed at the second signal")
            return
        self.signum = signum
        passed_on = signal.SIGTERM if signum == signal.SIGHUP else signum
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, passed_on)
        reason = f"ranks killed after launch.stop_deadline_s={self._deadline_s:g}"
        timer = threading.Timer(self._deadline_s, self._kill, [reason])
        timer.daemon = True
        timer.start()

    def _kill(self, reason: str) -> None:
        self.killed_ranks = self.killed_ranks or reason
        for pid in self._pids():
            with suppress(ProcessLookupError):
                # Each rank leads a process group, which holds its loader processes too.
                os.killpg(pid, signal.SIGKILL)

    def _pids(self) -> list[int]:
        return [worker.id for worker in self._agent.get_worker_group().workers if worker.id]


def _first_failure(logs: Path, failures: dict[int, Any], interrupted: bool) -> tuple[int, str] | None:
    """Exit status and account of the failure that the others followed from, or None if nothing failed.

    Args:
        logs: the run's log folder.
        failures: the agent's, by rank, each with its exit code and the second in which it was noticed.
        interrupted: a signal was passed on, so that ranks dead by a signal are no failure.
    """
    noted = [json.loads(path.read_text(encoding="utf-8")) for path in logs.glob("failure_rank_*.json")]
    if failures and not interrupted:
        first_s = min(failure.timestamp for failure in failures.values())
        for rank, failure in failures.items():
            # Killed from outside, or crashed: what the others noted (a lost connection) is its consequence. A rank
            # that the agent ended afterwards died of SIGTERM, or later.
            is_first = failure.timestamp == first_s
            if is_first and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                return 1, _account(logs, rank, f"died of {signal.Signals(-failure.exitcode).name}", None)
    if noted:
        first = min(noted, key=lambda failure: failure["time_ns"])
        if first["is_users"]:
            return 2, first["message"]
        return 1, _account(logs, first["rank"], "failed", first["message"])
    if failures and not interrupted:
        rank, failure = next(iter(failures.items()))
        return 1, _account(logs, rank, f"ended with exit status {failure.exitcode}", None)
    return None


def _account(logs: Path, rank: int, what: str, text: str | None) -> str:
    log = logs / f"rank_{rank}.log"
    if text is None:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    tail = "\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES_SHOWN:])
    where = f" ({log})" if log.exists() else " (its output is above)"
    return f"rank {rank} {what}{where}\n{tail}".rstrip()
