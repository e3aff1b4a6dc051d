"""How soon `octofold` answers, how soon it trains, and how much memory it takes, on this machine.

    .venv/bin/python benchmarks/startup.py [--runs 5]

Each figure is of fresh processes, the median over the runs, beside its target. "First step" counts from the start of
the process to the line of step 1 in metrics.jsonl, one rank training the tiny model: cold reads and tokenises the
standard library, warm finds that done. Memory is the peak resident set of one rank that takes a few steps of the
quickstart and saves a checkpoint.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OCTOFOLD = Path(sys.executable).with_name("octofold")
# A launcher's variables would make each process one rank of its job.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
# A run that is stopped when it has done what is measured.
ENDLESS = ["run_dir=run", "train.steps=100000", "train.log_every=1", "train.eval_every=0"]
INTERRUPTED = 0  # stopped by SIGTERM, and saved
MEMORY_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """One process: wall-clock seconds to what was waited for, and its peak resident memory."""

    seconds: float
    peak_bytes: int


def measure(folder: Path, arguments: list[str], expected: int, until_step: int = 0) -> Measured:
    """Run `octofold` in an empty folder until it ends or, if asked, until it has recorded a step; then stop it.

    Args:
        folder: working directory.
        arguments: of the command; with `until_step` they must set run_dir=run.
        expected: the exit status without which nothing was measured; the benchmark then ends with the command's words.
        until_step: the step to wait for; 0 waits for the end.
    """
    log = folder / "output.log"
    began_s = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen([OCTOFOLD, *arguments], cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
    if until_step:
        while not has_recorded(folder / "run/metrics.jsonl", until_step) and not has_ended(process):
            time.sleep(0.01)
        seconds = time.perf_counter() - began_s
        # Not `process.send_signal`, which would reap a process that has ended.
        os.kill(process.pid, signal.SIGTERM)
    _, wait_status, usage = os.wait4(process.pid, 0)
    if not until_step:
        seconds = time.perf_counter() - began_s
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    if process.returncode != expected:
        words = log.read_text(encoding="utf-8", errors="replace")
        sys.exit(f"octofold ended with status {process.returncode} instead of {expected}:\n{words}")
    return Measured(seconds, usage.ru_maxrss * 1024)  # Linux counts in KiB.


def has_recorded(metrics: Path, step: int) -> bool:
    """Whether the last whole line of the file is of this step or a later one."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1])["step"] >= step


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process is over; it stays a zombie, so that its memory can still be asked for."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="processes started for each figure")
    runs = parser.parse_args().runs
    print(f"{os.cpu_count()} logical CPUs, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}; {runs} runs")
    print(f"{'':40}{'median':>12}{'target':>12}", flush=True)
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)

        def first_step(folder: Path, cache: Path) -> Measured:
            return measure(folder, ["train", "model=tiny", f"data.cache_dir={cache}", *ENDLESS], INTERRUPTED, 1)

        def quickstart(folder: Path) -> Measured:
            arguments = ["train", "experiment=quickstart", "launch.nproc_per_node=1", "parallel.expert=1", *ENDLESS]
            return measure(folder, [*arguments, f"data.cache_dir={root / 'warm'}"], INTERRUPTED, MEMORY_STEPS)

        def repeat(one: Callable[[Path], Measured]) -> list[Measured]:
            return [one(Path(tempfile.mkdtemp(dir=root))) for _ in range(runs)]

        first_step(Path(tempfile.mkdtemp(dir=root)), root / "warm")
        timed: list[tuple[str, float, Callable[[Path], Measured]]] = [
            ("octofold --help", 0.5, lambda folder: measure(folder, ["--help"], 0)),
            ("octofold train, a refused config", 2.0, lambda folder: measure(folder, ["train", "train.stepz=5"], 2)),
            ("octofold train, first step, cold", 15.0, lambda folder: first_step(folder, folder / "cache")),
            ("octofold train, first step, warm", 15.0, lambda folder: first_step(folder, root / "warm")),
        ]
        for name, target_s, one in timed:
            seconds = statistics.median(measured.seconds for measured in repeat(one))
            print(f"{name:40}{seconds:10.2f} s{target_s:10.1f} s", flush=True)
        peak_mib = statistics.median(measured.peak_bytes for measured in repeat(quickstart)) / 2**20
        print(f"{'peak memory, quickstart on one rank':40}{peak_mib:8.0f} MiB{'none':>12}")


if __name__ == "__main__":
    main()
