"""Jobs that `octofold launch` hands to a real Slurm on this machine (tests/slurm_cluster.py)."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from job_processes import started
from run_configs import newest, overrides, tiny_run, write_corpus
from safetensors.numpy import load_file
from slurm_cluster import SlurmCluster

from octofold.backends.errors import UserError
from octofold.launch.compose import literal_override
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.run_folder import read_config
from octofold.launch.slurm import check, prepare
from octofold.launch.slurm_config import SlurmConfig
from octofold.train.metrics import read_metrics

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(600),
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]
OCTOFOLD = [sys.executable, "-P", "-m", "octofold.launch.cli"]
STEPS = 30
END_S = 240.0
"""For a job to end; generous, since a busy machine imports slowly."""
HOSTILE = "a b'\"$(touch pwned)`touch pwned`;#%j%%\tü|&"


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    with slurm_cluster.running(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, root: Path) -> Path:
    """The folder of a run on two nodes with two ranks each."""
    run_dir = root / "undisturbed"
    told = ended(cluster, submitted(cluster, root, run_dir), run_dir)
    assert (told["JobState"], told["Restarts"], told["NumNodes"]) == ("COMPLETED", "0", "2"), printed(run_dir)
    return run_dir


def job_config(root: Path, *, steps: int) -> Any:
    config = tiny_run(root, 4, model={"num_hidden_layers": 2}, parallel={"expert": 4}, train={"steps": steps})
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=4))


def launch(cluster: SlurmCluster, folder: Path, *texts: str, flags: tuple[str, ...] = ()) -> str:
    """Have `octofold launch` submit a job from `folder`; returns the job's number."""
    done = subprocess.run(
        [*OCTOFOLD, "launch", *flags, *texts, "launch=slurm", "launch.nodes=2", "launch.nproc_per_node=2"],
        env=cluster.environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


def submitted(cluster: SlurmCluster, root: Path, run_dir: Path, *more: str, steps: int = STEPS) -> str:
    texts = overrides(replace(job_config(root, steps=steps), run_dir=str(run_dir), resume="auto"))
    return launch(cluster, root, *texts, *more)


def ended(cluster: SlurmCluster, number: str, run_dir: Path) -> dict[str, str]:
    """Wait until a job is over, without the delay of a requeue; returns what Slurm tells of it."""
    end_s = time.monotonic() + END_S
    while (told := cluster.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
        assert time.monotonic() < end_s, f"{told}\n{printed(run_dir)}\n{cluster.logs()}"
        time.sleep(0.3)
    return told


def printed(run_dir: Path) -> str:
    """What jobs have printed into the run's folder."""
    return "\n".join(path.read_text() for path in sorted((run_dir / "launch").glob("slurm_*.log")))


def reach(cluster: SlurmCluster, number: str, run_dir: Path, step: int) -> None:
    """Wait until a job has made a step."""
    end_s = time.monotonic() + END_S
    while not any(record["step"] >= step for record in read_metrics(run_dir)):
        told = cluster.job(number)
        assert told["JobState"] in ("PENDING", "RUNNING"), f"{told}\n{printed(run_dir)}"
        assert time.monotonic() < end_s, f"{told}\n{printed(run_dir)}\n{cluster.logs()}"
        time.sleep(0.05)


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir) if record["kind"] == "train"]


def tensors(run_dir: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return {name: t for file in newest(run_dir).glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """The same losses at every step, and the same bits in the end."""
    ours, theirs = train_records(run_dir), train_records(expected)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    assert [(r["loss"], r["grad_norm"]) for r in ours] == [(r["loss"], r["grad_norm"]) for r in theirs]
    found, wanted = tensors(run_dir), tensors(expected)
    assert wanted
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_two_nodes_train_what_one_host_does(root: Path, undisturbed: Path) -> None:
    one_host = root / "one_host"
    with started(job_config(root, steps=STEPS), one_host, 4) as process:
        text, _ = process.communicate(timeout=END_S)
        assert process.returncode == 0, text
    ours, theirs = ([r["loss"] for r in train_records(run_dir)] for run_dir in (undisturbed, one_host))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.slow
def test_the_latest_run_is_the_one_of_the_launch(cluster: SlurmCluster, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run-before"
    shutil.copytree(undisturbed, run_dir)
    texts = ["launch=slurm", "launch.nodes=2", "launch.nproc_per_node=2", "resume=latest", "launch.dry_run=true"]
    done = subprocess.run(
        [*OCTOFOLD, "launch", *texts], env=cluster.environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert f"""'run_dir="{run_dir}"' 'resume="{run_dir}"' launch.name=torchrun""" in done.stdout, done.stderr


@pytest.mark.parametrize("how", ["warned", pytest.param("preempted", marks=pytest.mark.slow)])
def test_a_job_that_has_to_go_saves_and_comes_back(
    cluster: SlurmCluster, root: Path, undisturbed: Path, how: str
) -> None:
    run_dir = root / how
    number = submitted(cluster, root, run_dir)
    reach(cluster, number, run_dir, 6)
    if how == "warned":
        # What --signal=B:USR1@... does before the time limit.
        cluster.run("scancel", "--signal=USR1", "--batch", number)
    else:
        cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(number, lambda told: told["Restarts"] == "1", END_S)
    saved = newest(run_dir)
    told = ended(cluster, number, run_dir)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), printed(run_dir)
    assert f"octofold: job {number} waits in the queue again" in printed(run_dir)
    assert int(saved.name.removeprefix("step_")) < STEPS
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_slurm_warns_before_the_time_limit(cluster: SlurmCluster, root: Path) -> None:
    run_dir = root / "limit"
    number = submitted(cluster, root, run_dir, "launch.slurm.time=1:00:00", steps=1000)
    reach(cluster, number, run_dir, 2)
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    # Within launch.slurm.signal_lead_s from now on. Slurm looks twice a minute.
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.wait(number, lambda told: told["Restarts"] == "1", END_S)
    cluster.run("scancel", number)
    assert f"octofold: job {number} waits in the queue again" in printed(run_dir)
    last = max(record["step"] for record in read_metrics(run_dir))
    assert newest(run_dir).name == f"step_{last}"


@pytest.mark.slow
def test_a_lost_node_puts_the_job_on_others(cluster: SlurmCluster, root: Path, undisturbed: Path) -> None:
    run_dir = root / "lost"
    number = submitted(cluster, root, run_dir)
    reach(cluster, number, run_dir, 6)
    assert cluster.job(number)["NodeList"] == "n[1-2]"
    cluster.kill_node("n2")
    try:
        cluster.wait(number, lambda told: told["Restarts"] == "1", END_S)
        told = ended(cluster, number, run_dir)
    finally:
        cluster.start_node("n2")
    assert (told["JobState"], told["NodeList"]) == ("COMPLETED", "n[1,3]"), printed(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_an_agent_that_is_killed_fails_the_job(cluster: SlurmCluster, root: Path) -> None:
    run_dir = root / "killed"
    waits = ("launch.rendezvous.timeout_s=20", "launch.rendezvous.lost_after_s=5")
    number = submitted(cluster, root, run_dir, *waits, steps=1000)
    reach(cluster, number, run_dir, 6)
    cluster.kill_task("n2", number)
    told = ended(cluster, number, run_dir)
    assert (told["JobState"], told["Restarts"]) == ("FAILED", "0"), printed(run_dir)
    assert "node n2" in printed(run_dir)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_away(cluster: SlurmCluster, root: Path) -> None:
    run_dir = root / "cancelled"
    number = submitted(cluster, root, run_dir, steps=1000)
    reach(cluster, number, run_dir, 6)
    cluster.run("scancel", number)
    told = ended(cluster, number, run_dir)
    assert (told["JobState"], told["Restarts"]) == ("CANCELLED", "0"), printed(run_dir)
    last = max(record["step"] for record in read_metrics(run_dir))
    assert newest(run_dir).name == f"step_{last}"


def test_a_users_mistake_is_told_once(cluster: SlurmCluster, root: Path) -> None:
    run_dir = root / "mistake"
    data = shutil.copytree(root / "corpus", root / "going")
    more = (literal_override("data.path", str(data)), 'launch.slurm.options={hold:""}')
    number = submitted(cluster, root, run_dir, *more)
    shutil.rmtree(data)
    cluster.run("scontrol", "release", number)
    told = ended(cluster, number, run_dir)
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "2:0", "0"), printed(run_dir)
    assert "data.path" in printed(run_dir)


def test_nodes_of_different_sizes_are_refused(cluster: SlurmCluster, root: Path) -> None:
    run_dir = root / "uneven"
    number = submitted(cluster, root, run_dir, "launch.slurm.partition=uneven")
    told = ended(cluster, number, run_dir)
    assert (told["JobState"], told["ExitCode"]) == ("FAILED", "2:0"), printed(run_dir)
    assert "Slurm: SLURM_JOB_CPUS_PER_NODE=2,1 on n[3-4]" in printed(run_dir)
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.slow
def test_a_sweep_is_one_array(cluster: SlurmCluster, root: Path) -> None:
    texts = [text for text in overrides(job_config(root, steps=3)) if not text.startswith(("run_dir=", "optim.lr="))]
    sweep = "optim.lr=1e-3,2e-3"
    number = launch(cluster, root, *texts, sweep, "launch.slurm.array_parallelism=1", flags=("--multirun",))
    (script,) = (root / "runs").glob("*/launch/job.sh")
    folder = script.parent.parent
    for task, lr in enumerate((1e-3, 2e-3)):
        told = ended(cluster, f"{number}_{task}", folder)
        assert told["JobState"] == "COMPLETED", printed(folder)
        assert read_config(folder / str(task)).optim.lr == lr
        assert [r["step"] for r in read_metrics(folder / str(task)) if r["kind"] == "train"] == [1, 2, 3]


def test_hostile_names_arrive_and_run_nothing(cluster: SlurmCluster, root: Path) -> None:
    here = root / HOSTILE
    here.mkdir()
    run_dir, setup = here / "run", here / "setup.sh"
    setup.write_text("export OCTOFOLD_SETUP=sourced\nenv >&2\n")
    fields = {
        "name": HOSTILE,
        "run_dir": str(run_dir),
        "launch.slurm.setup": str(setup),
        "train.sample_prompt": HOSTILE + "\n\\",
        "resume": "auto",
    }
    texts = [t for t in overrides(job_config(root, steps=2)) if t.partition("=")[0] not in fields]
    texts += [literal_override(key, value) for key, value in fields.items()]
    escaped = literal_override("k", HOSTILE).partition("=")[2]
    texts += [f"launch.slurm.options={{comment:{escaped}}}", f"launch.environment={{HOSTILE:{escaped}}}"]
    texts += [literal_override("launch.slurm.account", HOSTILE)]
    number = launch(cluster, here, *texts)
    assert cluster.run("squeue", "-h", "-j", number, "-o", "%a").removesuffix("\n") == HOSTILE
    assert cluster.run("squeue", "-h", "-j", number, "-o", "%j").removesuffix("\n") == HOSTILE
    assert cluster.run("squeue", "-h", "-j", number, "-o", "%k").removesuffix("\n") == HOSTILE
    assert cluster.run("squeue", "-h", "-j", number, "-o", "%Z").removesuffix("\n") == str(here)
    end_s = time.monotonic() + END_S
    while cluster.run("squeue", "-h", "-j", number):
        assert time.monotonic() < end_s, printed(run_dir)
        time.sleep(0.3)
    config = read_config(run_dir)
    assert (config.name, config.train.sample_prompt) == (HOSTILE, HOSTILE + "\n\\"), printed(run_dir)
    assert config.launch.environment == {"HOSTILE": HOSTILE}
    assert "OCTOFOLD_SETUP=sourced" in printed(run_dir)
    assert max(record["step"] for record in read_metrics(run_dir)) == 2, printed(run_dir)
    assert not list(root.rglob("pwned"))


@pytest.mark.parametrize("key", ["partition", "gres", "memory", "constraint", "nodelist", "exclude"])
def test_hostile_fields_are_slurms_to_refuse(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    launch = LaunchConfig(name="slurm", nodes=2, slurm=SlurmConfig(**{key: HOSTILE}))  # type: ignore[arg-type]
    submission = prepare(JobConfig(run_dir=str(tmp_path / "run"), launch=launch), [], [])
    with pytest.raises(UserError, match=r"sbatch --test-only\n.*[Ii]nvalid"):
        check(submission)
    assert not list(tmp_path.iterdir())


def test_slurm_itself_refuses_what_it_cannot_run(cluster: SlurmCluster, root: Path, tmp_path: Path) -> None:
    for dry in ("true", "false"):
        texts = ["launch=slurm", "launch.nodes=9", "train.global_batch_size=36", "experiment=quickstart"]
        texts += [f"launch.dry_run={dry}", "launch.slurm.partition=nowhere", f"run_dir={tmp_path / 'run'}"]
        done = subprocess.run(
            [*OCTOFOLD, "launch", *texts],
            env=cluster.environ,
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "sbatch --test-only" in done.stderr
        assert "invalid partition specified: nowhere" in done.stderr
        assert not (tmp_path / "run").exists()


def test_the_environment_is_not_the_machines(cluster: SlurmCluster) -> None:
    """The nodes' names are theirs alone."""
    assert "n1" not in Path("/etc/hosts").read_text().split()
    assert "127.0.0.1" in cluster.run("srun", "-N1", "getent", "hosts", "n2")
    assert os.environ.get("SLURM_CONF") != cluster.environ["SLURM_CONF"]
