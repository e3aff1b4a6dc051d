"""Ranks are killed at any moment, also in the middle of saving, publishing and retention: the run is the same run.

Every trial lets a job of two ranks die once or several times, continues it, and holds what it ends with to the job that
nobody disturbed: every loss and gradient norm, every bit of the last checkpoint.
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import killing
import psutil
import pytest
from killing import Death
from run_configs import overrides, tiny_run, write_corpus
from safetensors.numpy import load_file

from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.run_folder import checkpoints, has_checkpoint, write_config
from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.validity import check_in_full
from octofold.train.config import RunConfig
from octofold.train.history import read_history
from octofold.train.metrics import read_metrics

RANKS, STEPS, EVERY = 2, 8, 2
DEFAULT_TRIALS, SLOW_TRIALS, ALL_TRIALS = 3, 15, 53
MOST_DEATHS = 3
"""Of one run, so that a death may meet what an earlier one has left behind."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run is compared by."""

    curve: list[tuple[Any, ...]]
    tensors: dict[str, bytes]


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody kills."""

    job: JobConfig
    outcome: Outcome
    operations: int
    """On files of checkpoints, by rank 0."""


def job_of(root: Path) -> JobConfig:
    config = tiny_run(
        root,
        RANKS,
        model={"num_hidden_layers": 2, "n_routed_experts": 4, "hidden_size": 32},
        parallel={"expert": RANKS},
        precision={"name": "bf16"},
        train={"steps": STEPS, "log_communication": False},
        checkpoint={"every_steps": EVERY, "keep": 2},
    )
    values = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    return JobConfig(**values, launch=LaunchConfig(nproc_per_node=RANKS, max_restarts=0))


def prepare(job: JobConfig, run_dir: Path) -> bool:
    """What `octofold train resume=auto` leaves to its ranks; whether there is something to continue."""
    resumes = has_checkpoint(run_dir)
    write_config(run_dir, replace(job, run_dir=str(run_dir), resume=str(run_dir) if resumes else None))
    return resumes


def outcome(run_dir: Path) -> Outcome:
    records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
    last = checkpoints(run_dir)[-1]
    assert last.name == f"step_{STEPS}"
    files = sorted(last.glob("*.safetensors"))
    tensors = {f"{f.name}:{name}": t.tobytes() for f in files for name, t in load_file(f).items()}
    return Outcome([(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records], tensors)


def steps_of(folders: Iterable[Path]) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in folders]


def valid(run_dir: Path) -> list[Path]:
    """Checkpoints of which every byte is as it was written."""
    found = checkpoints(run_dir)
    for folder in found:
        check_in_full(folder_at(folder))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    job = job_of(write_corpus(tmp_path_factory.mktemp("killed")))
    run_dir = tmp_path_factory.mktemp("undisturbed")
    prepare(job, run_dir)
    ending = killing.run(run_dir, RANKS)
    assert ending.codes == [0] * RANKS, (run_dir / "logs" / "rank_0.log").read_text()
    found = outcome(run_dir)
    assert [step for step, *_ in found.curve] == list(range(1, STEPS + 1))
    assert steps_of(checkpoints(run_dir)) == [STEPS - EVERY, STEPS], "retention takes part"
    return Undisturbed(job, found, ending.operations)


def note(seen: set[Path], run_dir: Path) -> None:
    """Remember every checkpoint that has been published so far."""
    seen.update(checkpoints(run_dir))


def a_death(choose: random.Random, whole: Undisturbed) -> Death:
    """Half of all strike at a moment of the run, half just before a certain operation on a file of a checkpoint."""
    rank = choose.randrange(RANKS)
    if choose.random() < 0.5:
        return Death(rank, after_steps=choose.randrange(STEPS), delay_s=choose.uniform(0.0, 0.1))
    # Rank 0 also publishes and retires, so it has more of them to die before.
    rank = choose.choice([0, 0, 0, rank])
    return Death(rank, before_operation=choose.randint(1, max(1, whole.operations if rank == 0 else STEPS)))


def assert_survives(seed: int, whole: Undisturbed, run_dir: Path) -> str:
    """Kill, continue, and so on until the run has ended; returns what happened, for people."""
    choose = random.Random(seed)
    deaths = [a_death(choose, whole) for _ in range(choose.randint(1, MOST_DEATHS))]
    told, newest = [], 0
    for death in [*deaths, None]:
        resumes = prepare(whole.job, run_dir)
        assert resumes == bool(newest), "what was published is still there"
        seen: set[Path] = set()
        ending = killing.run(run_dir, RANKS, death, partial(note, seen, run_dir))
        told.append(f"{death} ended {ending.codes} with {[path.name for path in checkpoints(run_dir)]}")
        before, newest = newest, max(steps_of(valid(run_dir)), default=0)
        assert newest >= max([before, *steps_of(seen)]), f"a published checkpoint was lost: {told}"
        if not any(ending.codes):
            break
    assert ending.codes == [0] * RANKS, f"{told}\n{(run_dir / 'logs' / 'rank_0.log').read_text()}"
    found = outcome(run_dir)
    assert found.curve == whole.outcome.curve, told
    assert found.tensors.keys() == whole.outcome.tensors.keys(), told
    wrong = [name for name, tensor in whole.outcome.tensors.items() if found.tensors[name] != tensor]
    assert not wrong, (told, wrong[:5])
    left = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".step_")]
    # A life that had nothing to save has swept nothing.
    assert not left or before == STEPS, f"half-written checkpoints stay behind: {left}"
    return "; ".join(told)


@pytest.mark.parametrize("seed", range(DEFAULT_TRIALS))
def test_a_killed_run_is_the_same_run(seed, undisturbed, tmp_path):
    print(assert_survives(seed, undisturbed, tmp_path))


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.slow if seed < SLOW_TRIALS else pytest.mark.matrix)
        for seed in range(DEFAULT_TRIALS, ALL_TRIALS)
    ],
)
def test_a_run_killed_fifty_times_over_is_the_same_run(seed, undisturbed, tmp_path):
    print(assert_survives(seed, undisturbed, tmp_path))
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_command_whose_rank_is_killed_goes_on_when_it_is_given_again(undisturbed, tmp_path):
    """`octofold train … resume=auto`, twice: with its own launcher and fresh interpreters."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", "from octofold.launch.cli import main; raise SystemExit(main())", "train"]
    command += overrides(replace(undisturbed.job, run_dir=str(run_dir), resume="auto"))
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        victim = rank_process(process.pid, "1")
        deadline_s = time.monotonic() + 60
        while not checkpoints(run_dir):
            assert time.monotonic() < deadline_s
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        victim.kill()
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1, printed
    assert "rank 1 died of SIGKILL" in printed
    assert max(record["step"] for record in read_metrics(run_dir)) < STEPS
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    found = outcome(run_dir)
    assert found == undisturbed.outcome
    assert [event["event"] for event in read_history(run_dir)] == ["begin", "failure", "end", "resume", "load", "end"]


def rank_process(launcher: int, rank: str) -> psutil.Process:
    """The process of a rank that a launcher has started."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for child in psutil.Process(launcher).children(recursive=True):
            try:
                if "octofold.launch.worker" in child.cmdline() and child.environ().get("RANK") == rank:
                    return child
            except psutil.Error:
                continue
        time.sleep(0.01)
    raise AssertionError("no such rank")
