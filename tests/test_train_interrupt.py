"""Runs that are stopped in the middle, as processes that real signals reach: nothing saved is lost, and they go on."""

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import run_tasks
from job_processes import (
    COMMAND,
    DEADLINE_S,
    free_ports,
    is_training,
    rank_processes,
    session,
    started,
    wait_for,
    wait_for_step,
)
from run_configs import newest, overrides, steps_of, tiny_run, write_corpus

from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.config import RunConfig
from octofold.train.metrics import read_metrics

STEPS = 40
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


def assert_resumes_to(expected: dict[str, Any], root: Path, run_dir: Path, n: int, ranks: Any) -> None:
    """The rest of the run ends in the undisturbed one's bits, and its records are one curve."""
    config = run_config(root, n, resume=str(run_dir))
    found = ranks(n).run(run_tasks.run, config, run_dir)[0]
    assert [record["step"] for record in found["records"]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    for name, tensor in expected["tensors"].items():
        assert tensor.tobytes() == found["tensors"][name].tobytes(), name


@pytest.mark.parametrize(
    ("n", "number", "status"),
    [
        (1, signal.SIGINT, 130),
        pytest.param(1, signal.SIGUSR1, 0, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_run_goes_on(n, number, status, root, undisturbed, ranks, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_config(root, n), run_dir, n) as process:
        wait_for_step(process, run_dir, 6)
        process.send_signal(number)
        began_s = time.monotonic()
        printed = process.communicate(timeout=PROMPT_S + DEADLINE_S)[0]
        assert time.monotonic() - began_s < PROMPT_S
    assert process.returncode == status, printed
    last = read_metrics(run_dir)[-1]["step"]
    assert 6 <= last < STEPS
    assert f"stopped at step {last}; saved {run_dir}/checkpoints/step_{last}" in printed
    assert "Traceback" not in printed
    assert newest(run_dir).name == f"step_{last}"
    assert read_manifest(newest(run_dir)).state["step"] == last
    assert_resumes_to(undisturbed(n), root, run_dir, n, ranks)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step(root, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_config(root, 2), run_dir, 2) as process:
        wait_for_step(process, run_dir, 3)
        rank_processes(process)[1].send_signal(signal.SIGUSR1)
        printed = process.communicate(timeout=PROMPT_S + DEADLINE_S)[0]
    assert process.returncode == 0, printed
    last = read_metrics(run_dir)[-1]["step"]
    assert f"stopped at step {last}; saved" in printed
    assert newest(run_dir).name == f"step_{last}"


@pytest.mark.slow
def test_a_signal_to_one_of_slurms_tasks_stops_all(root, tmp_path):
    """`#SBATCH --signal=USR1@60` reaches every task, but not at once."""
    (port,) = free_ports(1)
    said = {"SLURM_NTASKS": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "SLURM_JOB_ID": "7"}
    command = [*COMMAND, *overrides(replace(run_config(root, 2), run_dir=str(tmp_path)))]
    with (
        session(command, SLURM_PROCID="0", SLURM_LOCALID="0", **said) as first,
        session(command, SLURM_PROCID="1", SLURM_LOCALID="1", **said) as second,
    ):
        wait_for_step(first, tmp_path, 3)
        second.send_signal(signal.SIGUSR1)
        printed = [task.communicate(timeout=DEADLINE_S)[0] for task in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], printed
    assert newest(tmp_path).name == f"step_{read_metrics(tmp_path)[-1]['step']}"


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_outlasts_the_deadline_is_not_waited_for(n, root, tmp_path):
    run_dir = tmp_path / "run"
    config = run_config(root, n)
    config = replace(config, train=replace(config.train, global_batch_size=1 << 16))  # minutes of computation
    with started(config, run_dir, n, "launch.stop_deadline_s=1") as process:

        def training() -> bool:
            found = [psutil.Process(process.pid)] if n == 1 else rank_processes(process)
            return len(found) == n and all(map(is_training, found))

        wait_for(process, training, "the first step")
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=PROMPT_S + DEADLINE_S)[0]
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "the newest complete checkpoint stands" in printed


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_after_the_last_step_ends_a_run_that_is_saved(n, root, tmp_path):
    run_dir = tmp_path / "run"
    config = run_config(root, n)
    # A sample of hours.
    config = replace(config, train=replace(config.train, steps=4, sample_tokens=10**7))
    with started(config, run_dir, n) as process:
        wait_for_step(process, run_dir, 4)
        wait_for(process, lambda: steps_of(run_dir) == [4], "the last checkpoint")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=PROMPT_S + DEADLINE_S)[0]
    assert process.returncode == 0, printed
    assert "SIGTERM in the closing evaluation; the last step is saved" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("more", ["resume=auto", "checkpoint.every_steps=1"])
def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(more, root, undisturbed, ranks, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_config(root, 1), run_dir, 1) as process:
        wait_for_step(process, run_dir, 4)
        process.send_signal(signal.SIGSTOP)  # so that it cannot end before the other has begun
        with started(run_config(root, 1), run_dir, 1, more) as second:
            refused = second.communicate(timeout=DEADLINE_S)[0]
        process.send_signal(signal.SIGCONT)
        assert second.returncode == 2, refused
        assert f"run_dir={run_dir}" in refused
        printed = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0, printed
    assert_resumes_to(undisturbed(1), root, run_dir, 1, ranks)


@pytest.mark.slow
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
    assert set(steps_of(run_dir)) <= {4, 8, *range(12, STEPS, 4)}
    assert steps_of(run_dir)
    assert_resumes_to(undisturbed(n), root, run_dir, n, ranks)
