"""`octofold status`: what a run's folder tells of a job that runs, has ended, failed, or is gone."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from octofold.launch.cli import main
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import write_config
from octofold.launch.run_lock import locked
from octofold.launch.status import status_of
from octofold.train.history import append


def made(run_dir, *, steps=10, at=4):
    config = JobConfig(name="told")
    run_dir.mkdir(exist_ok=True)
    write_config(run_dir, replace(config, train=replace(config.train, steps=steps)))
    record = {"kind": "train", "step": at, "loss": 2.5, "tokens_per_s": 1000.0, "step_s": 2.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return run_dir


def test_a_job_that_trains_into_the_folder_is_running(tmp_path, capsys):
    run_dir = made(tmp_path / "run")
    code = (
        "import sys, pathlib; from octofold.launch.run_lock import locked\n"
        f"with locked(pathlib.Path({str(run_dir)!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert main(["status", str(run_dir)]) == 0
        assert f"running (process {holder.pid} on " in (said := capsys.readouterr().out)
        assert "step        4 of 10, loss 2.5, 1,000 tokens/s, 12 s left, written" in said
        holder.communicate()
    assert status_of(run_dir).state == "gone"


@pytest.mark.parametrize(
    ("status", "signal", "state", "exit_status"),
    [(0, None, "done", 0), (0, 15, "stopped", 0), (130, 2, "stopped", 0), (1, None, "failed", 1)],
)
def test_how_a_job_ended(status, signal, state, exit_status, tmp_path, capsys):
    run_dir = made(tmp_path / "run")
    append(run_dir, "begin", ranks=2)
    append(run_dir, "end", status=status, signal=signal)
    assert main(["status", str(run_dir), "--json"]) == exit_status
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["restarts"], found["failure"]) == (state, 4, 0, None)


def test_restarts_and_the_last_error_are_those_of_the_job_that_began_last(tmp_path, capsys):
    run_dir = made(tmp_path / "run")
    append(run_dir, "begin", ranks=2)
    append(run_dir, "failure", rank=0, node="a", message="old", restart=1)
    append(run_dir, "resume", asked="auto", changes=[], allowed=[])
    append(run_dir, "failure", rank=1, node="b", message="rank 1 died of SIGKILL", restart=1)
    append(run_dir, "failure", rank=3, node="c", message="rank 3 failed\n  KeyError: 'x'", restart=None)
    assert main(["status", str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert "restarts    1" in said
    assert "rank 3 on c\n  rank 3 failed\n    KeyError: 'x'" in said
    assert "old" not in said


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["status"]) == 2
    with locked(tmp_path):
        assert main(["status", "--what"]) == 2


def test_nodes_that_stand_by_are_those_of_the_job_that_began_last(tmp_path):
    run_dir = made(tmp_path / "run")
    append(run_dir, "nodes", running=["a"], standing_by={"b": "disk: full"})
    append(run_dir, "begin", ranks=1)
    assert status_of(run_dir).standing_by == {"b": "disk: full"}
    append(run_dir, "nodes", running=["a"], standing_by={})
    assert status_of(run_dir).standing_by == {}
    append(run_dir, "nodes", running=["a"], standing_by={"c": "its links are slow"})
    append(run_dir, "end", status=1, signal=None)
    append(run_dir, "resume", ranks=2)
    assert status_of(run_dir).standing_by == {}
