"""Runs that are stopped in the middle, as processes that real signals reach: nothing saved is lost, and they go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_tasks
from run_configs import overrides, tiny_run, write_corpus

from octofold.train.checkpoint.manager import find, published
from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.config import RunConfig
from octofold.train.metrics import read_metrics

STEPS = 40
DEADLINE_S = 60.0
"""For a run to start; generous, since a busy machine imports slowly."""
PROMPT_S = 15.0
"""For a run to end once it is told to: a step, a checkpoint and the end of a process."""


def run_config(root: Path, n: int, **groups: Any) -> RunConfig:
    return tiny_run(
        root,
        n,
        model={"num_hidden_layers": 2},
        parallel={"expert": n},
        train={"steps": STEPS},
        checkpoint={"every_steps": 4},
        **groups,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("interrupt"))


@pytest.fixture(scope="module")
def undisturbed(root: Path, ranks: Any) -> Any:
    """The records and the last checkpoint's tensors of the run that nobody stops, by number of ranks."""
    done: dict[int, dict[str, Any]] = {}

    def run(n: int) -> dict[str, Any]:
        if n not in done:
            done[n] = ranks(n).run(run_tasks.run, run_config(root, n), root / f"undisturbed{n}")[0]
        return done[n]

    return run


@contextmanager
def started(config: RunConfig, run_dir: Path, n: int) -> Iterator[subprocess.Popen[str]]:
    """`octofold train` of `n` ranks, in a session of its own so that nothing of it can outlive the test."""
    arguments = [*overrides(replace(config, run_dir=str(run_dir))), f"launch.nproc_per_node={n}"]
    command = [sys.executable, "-c", "from octofold.launch.cli import main; raise SystemExit(main())", "train"]
    process = subprocess.Popen(
        [*command, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            pytest.fail(f"the run ended too early:\n{process.communicate()[0]}")
        if any(record["step"] >= step for record in read_metrics(run_dir)):
            return
        time.sleep(0.01)
    pytest.fail(f"the run did not reach step {step}")


def assert_resumes_to(expected: dict[str, Any], root: Path, run_dir: Path, n: int, ranks: Any) -> None:
    """The rest of the run ends in the undisturbed one's bits, and its records are one curve."""
    config = run_config(root, n, resume=str(run_dir))
    found = ranks(n).run(run_tasks.run, config, run_dir)[0]
    assert [record["step"] for record in found["records"]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    for name, tensor in expected["tensors"].items():
        assert tensor.tobytes() == found["tensors"][name].tobytes(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("n", [1, 2])
def test_signal_saves_and_the_run_goes_on(n, number, root, undisturbed, ranks, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_config(root, n), run_dir, n) as process:
        wait_for_step(process, run_dir, 6)
        process.send_signal(number)
        began_s = time.monotonic()
        printed = process.communicate(timeout=PROMPT_S + DEADLINE_S)[0]
        assert time.monotonic() - began_s < PROMPT_S
    assert process.returncode == 128 + number, printed
    last = read_metrics(run_dir)[-1]["step"]
    assert 6 <= last < STEPS
    assert f"stopped at step {last}; saved {run_dir}/checkpoints/step_{last}" in printed
    assert "Traceback" not in printed
    assert find(run_dir).name == f"step_{last}"
    assert read_manifest(find(run_dir))["step"] == last
    assert_resumes_to(undisturbed(n), root, run_dir, n, ranks)


def test_killed_run_goes_on_from_its_last_checkpoint(root, undisturbed, ranks, tmp_path):
    n = 2
    run_dir = tmp_path / "run"
    with started(run_config(root, n), run_dir, n) as process:
        wait_for_step(process, run_dir, 10)
        process.kill()
        process.communicate(timeout=PROMPT_S)  # ends when no rank holds the pipe any more
    assert process.returncode == -signal.SIGKILL
    reached = max(record["step"] for record in read_metrics(run_dir))
    assert reached < STEPS
    assert set(published(run_dir)) <= {4, 8, *range(12, STEPS, 4)}
    assert published(run_dir)
    assert_resumes_to(undisturbed(n), root, run_dir, n, ranks)
