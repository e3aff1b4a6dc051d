"""`octofold train` as processes that tests send signals to."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from run_configs import overrides

from octofold.train.config import RunConfig
from octofold.train.metrics import read_metrics

DEADLINE_S = 180.0
"""For a run to start; generous, since a busy machine imports slowly."""
COMMAND = [sys.executable, "-c", "from octofold.launch.cli import main; raise SystemExit(main())", "train"]


@contextmanager
def started(config: RunConfig, run_dir: Path, n: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`octofold train` of `n` ranks, in a session of its own so that nothing of it can outlive the test."""
    arguments = [*overrides(replace(config, run_dir=str(run_dir))), f"launch.nproc_per_node={n}", *more]
    with session([*COMMAND, *arguments]) as process:
        yield process


@contextmanager
def session(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing outlives the context."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for member in reversed(family):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], what: str) -> None:
    """Return once the condition holds; fail where the process ends before, or it takes too long."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended too early:\n{process.communicate()[0]}")
        if time.monotonic() > deadline_s:
            pytest.fail(f"waited in vain for {what}")
        time.sleep(0.01)


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Return once the metrics show that step."""
    wait_for(process, lambda: any(record["step"] >= step for record in read_metrics(run_dir)), f"step {step}")


def rank_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a command has started, in their order; those that are about to end are left out."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "octofold.launch" in " ".join(child.cmdline()) and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def is_training(process: psutil.Process) -> bool:
    """Whether a rank has come so far that it handles signals to stop."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, below those that the system gives to connections meanwhile."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with suppress(OSError), socket.create_server(("localhost", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError("no free port between 20000 and 32000")
