"""Ranks of `octofold train` that a test may kill: real processes of a real job, forked from a server that has imported
all they need, and started, watched and ended as the launcher would.

A rank can be told to kill itself just before its n-th operation on a file of the run's checkpoints: wherever a save,
the publishing of a checkpoint or retention happens to be then.
"""

import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any

from octofold.launch.run_folder import read_config
from octofold.train.layout.prove import IMPORTS
from octofold.train.metrics import read_metrics

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "shutil.rmtree")
"""Audit events that are raised before such an operation, with the path first."""
ENDED_S = 60.0
"""For a tiny job to end once it has been started, on a busy machine."""
GRACE_S = (0.0, 0.2)
"""How long the launcher takes to notice a dead rank and end the others."""


@dataclass(frozen=True)
class Ending:
    """How the ranks of a job ended."""

    codes: list[int]
    """Exit codes; minus the signal."""
    operations: int
    """On files of checkpoints, by rank 0."""


@dataclass(frozen=True)
class Death:
    """Of one rank."""

    rank: int
    after_steps: int | None = None
    """As soon as this run has told of so many steps (metrics.jsonl; 0: at once), and a delay."""
    delay_s: float = 0.0
    before_operation: int | None = None
    """Just before this operation on a file of the checkpoints, counted from 1."""


def run(run_dir: Path, ranks: int, death: Death | None = None, watch: Callable[[], None] = lambda: None) -> Ending:
    """Run the job that `run_dir/config.yaml` describes until all ranks have ended.

    Args:
        death: kills one rank; the others are ended soon after, as the launcher does it. None: nobody dies.
        watch: called every few milliseconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    port, counted = _free_port(), context.Value("i", 0)
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        dies_at = death.before_operation if death is not None and death.rank == rank else None
        process = context.Process(
            target=_rank, args=(rank, ranks, port, str(run_dir), dies_at, counted), name=f"rank {rank}", daemon=True
        )
        process.start()
        processes.append(process)
    _attend(run_dir, processes, death, watch)
    codes = [process.exitcode or 0 for process in processes]
    return Ending(codes, int(counted.value))


def _attend(run_dir: Path, processes: list[BaseProcess], death: Death | None, watch: Callable[[], None]) -> None:
    began_s = time.monotonic()
    while any(process.is_alive() for process in processes):
        waited_s = time.monotonic() - began_s
        if death is not None and death.after_steps is not None and _steps(run_dir) >= death.after_steps:
            time.sleep(death.delay_s)
            processes[death.rank].kill()
        watch()
        if any(process.exitcode for process in processes) or waited_s > ENDED_S:
            time.sleep(random.uniform(*GRACE_S))
            for process in processes:
                process.kill()
        time.sleep(0.005)
    for process in processes:
        process.join()


def _steps(run_dir: Path) -> int:
    """That the run has told of."""
    return max((record["step"] for record in read_metrics(run_dir)), default=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, ranks: int, port: int, run_dir: str, dies_at: int | None, counted: Any) -> None:
    """Life of a rank, as octofold.launch.worker has it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    (Path(run_dir) / "logs").mkdir(exist_ok=True)
    log = os.open(Path(run_dir) / "logs" / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _count_operations(str(Path(run_dir) / "checkpoints"), dies_at, counted if rank == 0 else None)
    from octofold.train.main import train

    train(read_config(Path(run_dir)), Path(run_dir))


def _count_operations(folder: str, dies_at: int | None, counted: Any) -> None:
    seen, lock = 0, threading.Lock()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_OPERATIONS or not str(arguments[0]).startswith(folder):
            return
        with lock:
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if counted is not None:
            counted.value = seen

    sys.addaudithook(audit)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
