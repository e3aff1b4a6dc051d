"""Ranks: joining a launcher's, starting our own, and ending every one of them whatever happens.

Real processes; only what they compute is a stand-in for `octofold.train.main`, chosen by the job's name.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from octofold.backends.errors import UserError
from octofold.launch import agent
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.local import Ended, first_host, join, start_ranks, tasks_of_node
from octofold.launch.run_folder import read_config, write_config

OCTOFOLD = Path(sys.executable).with_name("octofold")
TWO_RANKS = LaunchConfig(nproc_per_node=2, max_restarts=0)

# Imported by Python at its start, from PYTHONPATH: the real command and worker then find this instead of the trainer.
STAND_IN = """
import os, signal, sys, time, types
from dataclasses import dataclass

RANK = os.environ.get("RANK", "0")

@dataclass
class Outcome:
    step: int
    interrupted_by: int | None = None

def train(config, run_dir, *, stop_deadline_s, before=None):
    note = lambda name, text="": (run_dir / f"{name}_{RANK}").write_text(str(text))

    def wait_for_rank_1():
        while not (run_dir / f"reached_{restart}_1").exists():
            time.sleep(0.01)
        time.sleep(0.2)

    got = []
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with (run_dir / f"attempts_{RANK}").open("a") as file:
        file.write(f"{restart} {config.resume and os.path.basename(config.resume)}\\n")
    if config.name in ("stop", "stubborn"):
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, lambda signum, frame: got.append(signum))
        note("ready", os.getpid())
        while not got or config.name == "stubborn":
            time.sleep(0.02)
        if (run_dir / "slow").exists():
            time.sleep(1.0)
        note("saved", got[0])
        return Outcome(5, got[0])
    print(f"rank {RANK} computes")
    if config.name == "crash":
        if RANK == "1":
            note(f"reached_{restart}")
            raise RuntimeError("rank one is broken")
        wait_for_rank_1()
        raise ConnectionError("lost my peer")
    if config.name == "mistake":
        from octofold.backends.errors import UserError
        raise UserError("the shelf is empty\\n  remedy: fill it")
    if config.name == "killed":
        if RANK == "1":
            note(f"reached_{restart}")
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_rank_1()
        raise ConnectionError("lost my peer")
    if config.name == "stuck" and restart == 0:
        # As in a collective: neither ends by itself nor hears signals.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        note("deaf")
        while RANK == "0" or not (run_dir / "deaf_0").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if config.name == "flaky" and restart < 2 and RANK == "1":
        from octofold.train.checkpoint.folders import folder_at
        from octofold.train.checkpoint.manifest import write_manifest
        folder = run_dir / "checkpoints" / f"step_{restart + 7}"
        folder.mkdir(parents=True)
        write_manifest(folder_at(folder), {"step": restart + 7})
        raise RuntimeError(f"trouble number {restart}")
    note("done", [os.environ.get("OMP_NUM_THREADS"), config.run_dir, config.train.seed, "torch" in sys.modules])
    return Outcome(10)

module = types.ModuleType("octofold.train.main")
module.train, module.Outcome = train, Outcome
sys.modules["octofold.train.main"] = module
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path_factory, monkeypatch):
    """Put the stand-in before every process that a test starts, and no launcher around it."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def make_run(tmp_path, name):
    run_dir = tmp_path / "a $HOME & 'run'"
    run_dir.mkdir()
    write_config(run_dir, JobConfig(name=name, run_dir=str(run_dir)))
    return run_dir


def wait_for(condition, timeout_s=60):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def is_ready(run_dir):
    return all((run_dir / f"ready_{rank}").exists() and (run_dir / f"ready_{rank}").read_text() for rank in (0, 1))


def rank_pids(run_dir):
    return [int((run_dir / f"ready_{rank}").read_text()) for rank in (0, 1)]


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- joining -----------------------------------------------------------------------------------------------------


def test_without_a_launcher_there_is_nothing_to_join():
    assert join({}) is None
    assert join({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert join({"SLURM_NTASKS": "8"}) is None, "an allocation without srun starts one process"


def test_torchruns_variables_are_taken_as_they_are():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    joined = join(environ | {"TORCHELASTIC_RUN_ID": "job7"})
    assert (joined.rank, joined.world_size, joined.job_id) == (3, 4, "job7")
    assert join(environ | {"TORCHELASTIC_RUN_ID": "none"}).job_id is None
    assert join(environ | {"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "9"}).job_id == "9"


def test_slurms_variables_are_translated():
    environ = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_NODELIST": "node[003-005,7],other",
        "SLURM_JOB_ID": "4242",
    }
    joined = join(environ)
    assert (joined.rank, joined.world_size, joined.job_id) == (5, 8, "4242")
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node003", "MASTER_PORT": "24242"}
    assert {name: environ[name] for name in expected} == expected
    assert environ["LOCAL_WORLD_SIZE"] == "4"
    given = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "mine", "MASTER_PORT": "77"}
    join(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("mine", "77")


def test_slurms_tasks_of_a_node():
    assert [tasks_of_node("8(x2),3", node) for node in range(3)] == [8, 8, 3]
    assert tasks_of_node("16", 0) == 16


def test_a_launcher_of_one_process_a_node_need_not_say_so():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    join(environ)
    assert (environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("solo", "solo"),
        ("a1,b2", "a1"),
        ("n[1-4]", "n1"),
        ("n[7,9]", "n7"),
        ("rack[02-03]-node[10,11]-ib,x", "rack02-node10-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set"),
        ({"RANK": "x"}, "RANK=x"),
        ({"RANK": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK="),
    ],
)
def test_a_launcher_that_sets_half_is_named(changes, part):
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"} | changes
    with pytest.raises(UserError, match=part):
        join({name: value for name, value in environ.items() if value is not None})


def test_joined_ranks_share_one_folder_and_the_first_writes_its_config(tmp_path):
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "job/7"}
    ranks = [
        subprocess.Popen([OCTOFOLD, "train", "name=j"], cwd=tmp_path, env=os.environ | given | {"RANK": str(rank)})
        for rank in (1, 0)
    ]
    assert [rank.wait(timeout=30) for rank in ranks] == [0, 0]
    run_dir = tmp_path / "runs" / "j-job_7"
    assert read_config(run_dir).parallel.data_shard == 2
    assert (run_dir / "done_0").read_text() == f"[None, '{run_dir}', 0, False]"


def test_joined_ranks_without_a_common_name_for_the_folder_are_refused(tmp_path):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [OCTOFOLD, "train"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run_dir=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


# --- one rank, in the process the user started ---------------------------------------------------------------------


def test_one_rank_trains_in_this_process_and_torch_is_left_to_it(tmp_path):
    done = subprocess.run(
        [OCTOFOLD, "train", "train.seed=4"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "done_0").read_text() == f"[None, '{run_dir}', 4, False]"
    assert read_config(run_dir).train.seed == 4


def test_a_mistake_found_by_the_trainer_leaves_the_folder_free(tmp_path):
    command = [OCTOFOLD, "train", "name=mistake", "run_dir=here"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, "octofold: the shelf is empty\n  remedy: fill it\n")


# --- several ranks, started here -----------------------------------------------------------------------------------


def test_ranks_share_the_cores_and_write_where_they_should(tmp_path, capfd):
    run_dir = make_run(tmp_path, "fine")
    before = dict(os.environ)
    assert start_ranks(TWO_RANKS, run_dir).status == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        assert (run_dir / f"done_{rank}").read_text().startswith(f"['{threads}',")
    assert (run_dir / "logs" / "rank_1.log").read_text() == "rank 1 computes\n"
    out, err = capfd.readouterr()
    assert (out, err) == ("rank 0 computes\n", "")
    assert dict(os.environ) == before


def test_the_users_thread_count_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_dir = make_run(tmp_path, "fine")
    start_ranks(TWO_RANKS, run_dir)
    assert (run_dir / "done_1").read_text().startswith("['7',")


def test_the_first_failure_is_told_and_its_consequences_are_not(tmp_path, capfd):
    run_dir = make_run(tmp_path, "crash")
    assert start_ranks(TWO_RANKS, run_dir).status == 1
    err = capfd.readouterr().err
    assert err.startswith("octofold: rank 1 failed")
    assert "RuntimeError: rank one is broken" in err
    assert str(run_dir / "logs" / "rank_1.log") in err
    assert "lost my peer" not in err


def test_a_killed_rank_is_the_first_failure(tmp_path, capfd):
    run_dir = make_run(tmp_path, "killed")
    assert start_ranks(TWO_RANKS, run_dir).status == 1
    assert "octofold: rank 1 died of SIGKILL" in capfd.readouterr().err


def test_a_users_mistake_in_a_rank_is_one_plain_message(tmp_path, capfd):
    run_dir = make_run(tmp_path, "mistake")
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=3), run_dir).status == 2
    assert {line for path in run_dir.glob("attempts_*") for line in path.read_text().splitlines()} == {"0 None"}
    assert capfd.readouterr().err == "octofold: the shelf is empty\n  remedy: fill it\n"


def test_an_earlier_failure_is_not_told_again(tmp_path, capfd):
    run_dir = make_run(tmp_path, "crash")
    start_ranks(TWO_RANKS, run_dir)
    write_config(run_dir, JobConfig(name="fine"))
    capfd.readouterr()
    assert start_ranks(TWO_RANKS, run_dir).status == 0
    assert capfd.readouterr().err == ""


def attempts(run_dir, rank):
    return (run_dir / f"attempts_{rank}").read_text().splitlines()


def test_failed_ranks_are_started_again_from_the_newest_checkpoint(tmp_path, capfd):
    run_dir = make_run(tmp_path, "flaky")
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=2), run_dir) == Ended(0)
    newest = run_dir.name
    assert attempts(run_dir, 1) == ["0 None", f"1 {newest}", f"2 {newest}"]
    # Rank 0 may have been ended before it came so far.
    assert set(attempts(run_dir, 0)) <= set(attempts(run_dir, 1))
    assert (run_dir / "done_0").exists()
    err = capfd.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("octofold: restart")] == [
        "octofold: restart 1 of launch.max_restarts=2",
        "octofold: restart 2 of launch.max_restarts=2",
    ]
    assert "RuntimeError: trouble number 1" in err


def test_restarts_are_bounded(tmp_path, capfd):
    run_dir = make_run(tmp_path, "flaky")
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=1), run_dir).status == 1
    assert len(attempts(run_dir, 1)) == 2
    assert capfd.readouterr().err.count("RuntimeError: trouble number 1") == 1


def test_the_same_exception_again_is_not_tried_a_third_time(tmp_path, capfd):
    run_dir = make_run(tmp_path, "crash")
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=9), run_dir).status == 1
    assert len(attempts(run_dir, 1)) == 2


def test_a_rank_that_hears_nothing_does_not_delay_the_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "FAILURE_GRACE_S", 0.2)
    run_dir = make_run(tmp_path, "stuck")
    began_s = time.monotonic()
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=1), run_dir) == Ended(0)
    assert time.monotonic() - began_s < 25, "the agent by itself waits 30 s"


def signal_when_ready(run_dir, *signals):
    """Send this process signals, a moment apart, once both ranks train."""

    def send():
        wait_for(lambda: is_ready(run_dir))
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(
    ("sent", "received", "status"),
    [("SIGTERM", "SIGTERM", 0), ("SIGUSR1", "SIGUSR1", 0), ("SIGHUP", "SIGTERM", 129), ("SIGINT", "SIGINT", 130)],
)
def test_a_signal_is_passed_on_and_ranks_end_after_saving(tmp_path, sent, received, status):
    run_dir = make_run(tmp_path, "stop")
    handler = signal.getsignal(signal.SIGTERM)
    signal_when_ready(run_dir, signal.Signals[sent])
    assert start_ranks(TWO_RANKS, run_dir) == Ended(status, signal.Signals[sent])
    assert [(run_dir / f"saved_{rank}").read_text() for rank in (0, 1)] == [str(int(signal.Signals[received]))] * 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_ranks_that_outstay_the_deadline_are_killed(tmp_path, capfd):
    run_dir = make_run(tmp_path, "stubborn")
    signal_when_ready(run_dir, signal.SIGTERM)
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=3, stop_deadline_s=0.5), run_dir).status == 143
    assert all(is_gone(pid) for pid in rank_pids(run_dir))
    assert "launch.stop_deadline_s=0.5" in capfd.readouterr().err


def test_a_second_signal_kills_at_once(tmp_path, capfd):
    run_dir = make_run(tmp_path, "stubborn")
    signal_when_ready(run_dir, signal.SIGINT, signal.SIGINT)
    began_s = time.monotonic()
    assert start_ranks(LaunchConfig(nproc_per_node=2, max_restarts=3, stop_deadline_s=100), run_dir).status == 130
    assert time.monotonic() - began_s < 50
    assert all(is_gone(pid) for pid in rank_pids(run_dir))
    assert "second signal" in capfd.readouterr().err


def start_command(tmp_path, name):
    command = [OCTOFOLD, "train", f"name={name}", "run_dir=run", "launch.nproc_per_node=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: is_ready(tmp_path / "run"))
    return process


def test_ctrl_c_ends_the_whole_command_after_saving(tmp_path):
    process = start_command(tmp_path, "stop")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")
    assert all((tmp_path / "run" / f"saved_{rank}").exists() for rank in (0, 1))
    assert all(is_gone(pid) for pid in rank_pids(tmp_path / "run"))


def test_a_second_command_in_the_same_folder_is_refused(tmp_path):
    process = start_command(tmp_path, "stop")
    command = [OCTOFOLD, "train", "name=fine", "run_dir=run", "resume=auto"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"process {process.pid} on" in done.stderr
    assert read_config(tmp_path / "run").name == "stop"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_folder_of_logs_that_cannot_be_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("")
    for ranks in (1, 2):
        command = [OCTOFOLD, "train", "name=fine", "run_dir=run", f"launch.nproc_per_node={ranks}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert f"run_dir={tmp_path}/run/logs" in done.stderr
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_scheduler_that_repeats_itself_does_not_cost_the_save(tmp_path):
    """Slurm sends SIGUSR1 and then SIGTERM; timeout signals a command and then its whole group."""
    run_dir = make_run(tmp_path, "stop")
    signal_when_ready(run_dir, signal.SIGUSR1, signal.SIGTERM)
    (run_dir / "slow").touch()
    assert start_ranks(TWO_RANKS, run_dir) == Ended(0, signal.SIGUSR1)
    assert all((run_dir / f"saved_{rank}").exists() for rank in (0, 1))


def test_no_rank_outlives_a_killed_command(tmp_path):
    process = start_command(tmp_path, "stubborn")
    pids = rank_pids(tmp_path / "run")
    process.kill()
    process.wait(timeout=30)
    wait_for(lambda: all(is_gone(pid) for pid in pids), timeout_s=5)


def test_a_sweep_runs_each_job_in_its_own_folder_and_tells_of_failures(tmp_path):
    command = [OCTOFOLD, "train", "--multirun", "name=mistake,fine", "train.seed=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "job 1 of 2: name=mistake train.seed=3\noctofold: the shelf is empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (finished,) = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith("fine")]
    assert (finished / "done_0").exists()
    assert read_config(finished).train.seed == 3
