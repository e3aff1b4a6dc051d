"""Ranks that die or hang are started again, by our agent or torchrun's, and the run ends as if nothing had been."""

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_tasks
from faulty_models import NAME, fault
from job_processes import COMMAND, session, wait_for_step
from run_configs import newest, overrides, tiny_run, write_corpus

from octofold.train.config import RunConfig
from octofold.train.metrics import read_metrics

STEPS = 14
HANG_S = 6.0
"""Beyond what a step of these runs takes on a machine that does much else."""
LIMIT_S = 280.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1"]


def run_config(root: Path, n: int, **groups: Any) -> RunConfig:
    return tiny_run(
        root,
        n,
        model={"num_hidden_layers": 2, "architecture": NAME},
        parallel={"expert": 1 if n == 3 else n},  # of eight experts
        train={"steps": STEPS, "global_batch_size": 2 * n, "micro_batch_size": 2, "hang_timeout_s": HANG_S},
        checkpoint={"every_steps": 4},
        **groups,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def undisturbed(root: Path, ranks: Any) -> Any:
    """The records and final tensors of the run that nothing happens to, by number of ranks."""
    done: dict[int, dict[str, Any]] = {}

    def run(n: int) -> dict[str, Any]:
        if n not in done:
            config = run_config(root, n)
            config = replace(config, model=replace(config.model, architecture="deepseek"))
            done[n] = ranks(n).run(run_tasks.run, config, root / f"undisturbed{n}")[0]
        return done[n]

    return run


def train(config: RunConfig, run_dir: Path, n: int, *more: str) -> list[str]:
    """The command line of `octofold train`."""
    return [*COMMAND, *overrides(replace(config, run_dir=str(run_dir))), f"launch.nproc_per_node={n}", *more]


def torchrun(config: RunConfig, run_dir: Path, n: int, *more: str) -> list[str]:
    """The command line of torchrun that starts `octofold train` as each rank."""
    return [*TORCHRUN, f"--nproc-per-node={n}", *more, "--no-python", *train(config, run_dir, n)]


def assert_as_undisturbed(run_dir: Path, expected: dict[str, Any], root: Path, n: int, ranks: Any) -> None:
    """One curve of the same bits, and the same final weights."""
    found = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected["records"], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    config = replace(run_config(root, n), resume=str(run_dir))
    config = replace(config, model=replace(config.model, architecture="deepseek"))
    tensors = ranks(n).run(run_tasks.initial_tensors, config, run_dir)[0]
    for name, tensor in expected["tensors"].items():
        assert tensor.tobytes() == tensors[name].tobytes(), name


@pytest.mark.slow
def test_a_killed_rank_of_four_costs_nothing_but_time(root, undisturbed, ranks, tmp_path):
    with session(train(run_config(root, 4), tmp_path, 4), **fault("kill", rank=2, forward=11)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    assert "rank 2 died of SIGKILL" in printed
    assert "restart 1 of launch.max_restarts=3" in printed
    assert "continuing from" in printed
    assert_as_undisturbed(tmp_path, undisturbed(4), root, 4, ranks)


@pytest.mark.slow
def test_without_a_checkpoint_it_begins_anew(root, undisturbed, ranks, tmp_path):
    with session(train(run_config(root, 2), tmp_path, 2), **fault("fail", rank=1, forward=3)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    assert "RuntimeError: the fault" in printed
    assert "continuing from" not in printed
    assert_as_undisturbed(tmp_path, undisturbed(2), root, 2, ranks)


@pytest.mark.slow
def test_torchrun_restarts_it_too(root, undisturbed, ranks, tmp_path):
    command = torchrun(run_config(root, 2), tmp_path, 2, "--max-restarts=1")
    with session(command, **fault("kill", rank=1, forward=7)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    assert re.search("continuing from .*step_4", printed)
    assert_as_undisturbed(tmp_path, undisturbed(2), root, 2, ranks)


@pytest.mark.slow
def test_a_users_mistake_is_noted_for_torchruns_next_attempts(root, tmp_path):
    config = run_config(root, 2)
    config = replace(config, model=replace(config.model, vocab_size=16))
    with session(torchrun(config, tmp_path, 2, "--max-restarts=3"), **fault("none", rank=0, forward=0)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode != 0
    assert "the tokenizer has 257 entries" in printed
    (note,) = (tmp_path / "logs").glob("mistake_*")
    assert "the tokenizer has 257 entries" in note.read_text(), "later attempts read it and end"


@pytest.mark.slow
def test_torchrun_that_is_preempted_leaves_a_checkpoint(root, tmp_path):
    config = run_config(root, 2)
    config = replace(config, train=replace(config.train, steps=10_000))
    with session(torchrun(config, tmp_path, 2), **fault("none", rank=0, forward=0)) as process:
        wait_for_step(process, tmp_path, 2)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=LIMIT_S)[0]
    last = read_metrics(tmp_path)[-1]["step"]
    assert f"stopped at step {last}; saved" in printed
    assert newest(tmp_path).name == f"step_{last}"


def logs_of(run_dir: Path, n: int) -> list[str]:
    return [(run_dir / "logs" / f"stacks_rank_{rank}.txt").read_text() for rank in range(n)]


@pytest.mark.slow
def test_a_rank_that_sleeps_for_ever_is_named_and_the_run_goes_on(root, undisturbed, ranks, tmp_path):
    with session(train(run_config(root, 3), tmp_path, 3), **fault("sleep", rank=1, forward=6)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    verdict = (tmp_path / "logs" / "hang.txt").read_text()
    assert re.match(
        r"rank 1 did not arrive at .*, where rank\(s\) \[0, 2\] wait: it stands at faulty_models.py", verdict
    )
    assert verdict.splitlines()[0] in printed
    stacks = logs_of(tmp_path, 3)
    assert "in come_to_grief" in stacks[1]
    assert all("WAITING" in stacks[rank] for rank in (0, 2))
    assert all("last collectives, newest first:\n" in text and "thread octofold-stop:" in text for text in stacks)
    assert_as_undisturbed(tmp_path, undisturbed(3), root, 3, ranks)


@pytest.mark.slow
def test_a_stopped_rank_gives_no_sign_and_is_killed(root, undisturbed, ranks, tmp_path):
    with session(train(run_config(root, 2), tmp_path, 2), **fault("stop", rank=0, forward=6)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    assert re.search(r"rank 0 did not arrive at .*: it gives no sign \(stopped, or gone\)", printed)
    assert_as_undisturbed(tmp_path, undisturbed(2), root, 2, ranks)


@pytest.mark.slow
def test_torchrun_restarts_after_a_hang(root, undisturbed, ranks, tmp_path):
    command = torchrun(run_config(root, 2), tmp_path, 2, "--max-restarts=1")
    with session(command, **fault("sleep", rank=0, forward=9)) as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, printed
    assert "rank 0 did not arrive at" in printed
    assert_as_undisturbed(tmp_path, undisturbed(2), root, 2, ranks)
