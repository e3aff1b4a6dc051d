"""The batch script of launch=slurm, and what no cluster could honour. test_launch_slurm_jobs.py has real jobs."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import compose
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.slurm import check, prepare, prepare_sweep
from octofold.launch.slurm_allocation import check_allocation
from octofold.launch.slurm_config import SlurmConfig, SlurmContainerConfig, check_slurm
from octofold.launch.slurm_script import directive, output_pattern

NASTY = "a b'\"$(touch pwned)`touch pwned`;#%j%%\tü|&\\"


def job(folder: Path, backend: str = "cpu", **slurm: Any) -> JobConfig:
    launch = LaunchConfig(name="slurm", nodes=2, nproc_per_node=4, slurm=SlurmConfig(**slurm))
    return JobConfig(name="big run", run_dir=str(folder), launch=launch, backend=BackendConfig(name=backend))


def script(config: JobConfig, overrides: list[str] | None = None) -> str:
    (text,) = prepare(config, overrides or ["launch=slurm"], ["/my configs"]).files.values()
    return text


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def unquoted(value: str) -> str:
    r"""A double-quoted value as sbatch reads it: only \" and \\ mean something else (tried with 22.05)."""
    assert value[0] == value[-1] == '"'
    found, rest = "", iter(value[1:-1])
    for character in rest:
        assert character != '"'
        found += next(rest) if character == "\\" else character
    return found


def test_one_agent_on_each_node(tmp_path: Path) -> None:
    text = script(job(tmp_path, partition="gpu", time="1-00:00:00"), ["launch=slurm", "name='big run'"])
    found = directives(text)
    assert {found[key] for key in ("job-name", "nodes", "ntasks-per-node")} == {'"big run"', '"2"', '"1"'}
    assert (found["time"], found["partition"], found["mem"]) == ('"1-00:00:00"', '"gpu"', '"0"')
    assert found["output"] == f'"{tmp_path}/launch/slurm_%j.log"'
    assert found["signal"] == '"B:USR1@120"'
    assert {"exclusive", "requeue"} <= found.keys()
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --cpu-bind=none" in text
    assert "'name='\"'\"'big run'\"'\"'' --config-dir '/my configs' resume=auto launch.name=torchrun" in text


def test_a_job_that_is_not_requeued_says_nothing_of_it(tmp_path: Path) -> None:
    text = script(job(tmp_path, requeue=False, exclusive=False))
    assert "no-requeue" in directives(text)
    assert not {"exclusive", "mem", "requeue"} & directives(text).keys()
    assert "scontrol" not in text


@pytest.mark.parametrize(
    ("backend", "slurm", "expected"),
    [
        ("cuda", {}, {"gpus-per-node": '"4"'}),
        ("cuda", {"gres": "gpu:h100:4"}, {"gres": '"gpu:h100:4"'}),
        ("cuda", {"gpus_per_node": 0}, {}),
        ("cpu", {}, {}),
        ("ascend", {"gres": "npu:4"}, {"gres": '"npu:4"'}),
    ],
)
def test_devices_are_asked_for_once(
    tmp_path: Path, backend: str, slurm: dict[str, Any], expected: dict[str, str]
) -> None:
    found = directives(script(job(tmp_path, backend, **slurm)))
    assert {key: value for key, value in found.items() if key.startswith("g")} == expected


def test_srun_hears_of_cpus_too(tmp_path: Path) -> None:
    text = script(job(tmp_path, cpus_per_node=16))
    assert directives(text)["cpus-per-task"] == '"16"'
    assert " --cpus-per-task=16 --cpu-bind=none " in text


def test_a_sweep_is_one_array(tmp_path: Path) -> None:
    jobs = [(job(tmp_path / str(n), array_parallelism=2), [f"optim.lr={n}"]) for n in range(3)]
    submission = prepare_sweep(tmp_path, jobs, [])
    text = submission.files["job.sh"]
    assert directives(text)["array"] == '"0-2%2"'
    assert directives(text)["output"] == f'"{tmp_path}/launch/slurm_%A_%a.log"'
    assert submission.commands == (("sbatch", f"{tmp_path}/launch/job.sh"),)
    for n in range(3):
        body = text[text.index("case") : text.index("esac")] + 'esac\nprintf "%s\\n" "${command[@]}"'
        ran = subprocess.run(["bash", "-c", body], env={"SLURM_ARRAY_TASK_ID": str(n)}, capture_output=True, text=True)
        assert f"optim.lr={n}" in ran.stdout.splitlines()
    other = replace(jobs[1][0], launch=replace(jobs[1][0].launch, nodes=3))
    with pytest.raises(ConfigError, match=r"launch\.nodes"):
        prepare_sweep(tmp_path, [jobs[0], (other, [])], [])


def test_containers(tmp_path: Path) -> None:
    image = SlurmContainerConfig(engine="pyxis", image="/images/o f.sqsh", mounts=["/data:/data:ro"])
    text = script(job(tmp_path, container=image))
    assert f"'--container-image=/images/o f.sqsh' --container-workdir={Path.cwd()}" in text
    assert f"--container-mounts={Path.cwd()}:{Path.cwd()},{tmp_path}:{tmp_path},/data:/data:ro" in text
    assert "command=(octofold train launch=slurm" in text
    sif = SlurmContainerConfig(engine="apptainer", image="/images/o.sif", options={"env": "A=b c", "cleanenv": ""})
    text = script(job(tmp_path, "cuda", container=sif))
    assert f"--pwd {Path.cwd()} '--env=A=b c' --cleanenv /images/o.sif octofold train" in text
    assert f"command=(apptainer exec --nv --bind {Path.cwd()}:{Path.cwd()},{tmp_path}:{tmp_path} " in text
    with pytest.raises(ConfigError, match="no colon"):
        script(job(tmp_path / "a:b", container=image))


@given(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])))
def test_a_directive_carries_any_line(value: str) -> None:
    line = directive("comment", value)
    assert "\n" not in line
    assert unquoted(line.removeprefix("#SBATCH --comment=")) == value


def test_a_folder_keeps_its_percent_signs() -> None:
    assert output_pattern("/a%j/100%", "slurm_%j.log") == "/a%%j/100%%/slurm_%j.log"


def test_hostile_words_reach_the_command_as_they_are(tmp_path: Path) -> None:
    text = script(job(tmp_path, srun_options={"mpi": NASTY}), [f"name={NASTY!r}", "train.sample_prompt='a\nb'"])
    lines = text.replace("srun --nodes", 'printf "%s\\0" --nodes').replace("&\nstep=$!", "")
    head = lines[: lines.index("# A signal ends")]
    ran = subprocess.run(["bash", "-c", head], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = ran.stdout.split("\0")
    assert f"--mpi={NASTY}" in words
    assert {f"name={NASTY!r}", "train.sample_prompt='a\nb'"} <= set(words)
    assert not list(tmp_path.iterdir())


def test_bash_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octofold.launch.slurm.shutil.which", lambda name: name if name == "bash" else None)
    submission = prepare(job(tmp_path, setup=NASTY), [f"name={NASTY!r}"], [])
    check(submission)
    assert submission.notes == ("sbatch is not installed here: the script was checked by bash alone",)
    broken = replace(submission, files={"job.sh": submission.files["job.sh"] + "("})
    with pytest.raises(UserError, match="bash -n"):
        check(broken)


@pytest.mark.parametrize(
    ("slurm", "named"),
    [
        ({"partition": "a\nb"}, "launch.slurm.partition"),
        ({"qos": ""}, "launch.slurm.qos"),
        ({"options": {"comment": "a\n#SBATCH --wrap=x"}}, "launch.slurm.options.comment"),
        ({"options": {"a b": "x"}}, "launch.slurm.options"),
        ({"options": {"output": "x"}}, "launch.slurm.options"),
        ({"srun_options": {"ntasks": "3"}}, "launch.slurm.srun_options"),
        ({"time": "soon"}, "launch.slurm.time"),
        ({"time": "3"}, "launch.slurm.time"),
        ({"time": "0:03:00"}, "launch.slurm.time"),
        ({"signal_lead_s": 30}, "launch.slurm.signal_lead_s"),
        ({"gres": "gpu:4", "gpus_per_node": 4}, "launch.slurm.gres"),
        ({"cpus_per_node": 0}, "launch.slurm.cpus_per_node"),
        ({"container": SlurmContainerConfig(engine="docker", image="x")}, "launch.slurm.container.engine"),
        ({"container": SlurmContainerConfig(engine="pyxis")}, "launch.slurm.container.image"),
        ({"container": SlurmContainerConfig("pyxis", "x", ["/a,/b"])}, "launch.slurm.container.mounts"),
    ],
)
def test_what_no_cluster_can_honour(slurm: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_slurm(SlurmConfig(**slurm), 30.0)
    assert caught.value.key == named


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "gres", "memory", "constraint", "nodelist", "exclude", "time"]
)
def test_no_line_of_slurms_is_broken(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_slurm(SlurmConfig(**{key: "a\n#SBATCH --wrap=id"}), 30.0)  # type: ignore[arg-type]
    assert caught.value.key == f"launch.slurm.{key}"


@pytest.mark.parametrize(
    "text", ["time=04:00:00", "time=90", "time=1-00:00:00", 'nodelist="n[1-3]"', 'constraint="a&b"']
)
def test_values_as_typed(text: str) -> None:
    slurm = compose(["launch=slurm", f"launch.slurm.{text}"]).launch.slurm
    key, _, value = text.partition("=")
    assert getattr(slurm, key) == value.strip('"')


@pytest.mark.parametrize("time", ["4", "0:03:01", "1-0", "UNLIMITED", "30:00", "0-00:04"])
def test_limits_as_slurm_writes_them(time: str) -> None:
    check_slurm(SlurmConfig(time=time), 30.0)


@pytest.mark.parametrize(
    ("change", "overrides", "named"),
    [
        ({"name": "a\nb"}, [], "name"),
        ({"run_dir": "/a\\b"}, [], "run_dir"),
        ({"run_dir": "/a\nb"}, [], "run_dir"),
        ({}, ["resume=/runs/a/checkpoints/step_3"], "resume"),
    ],
)
def test_jobs_that_slurm_cannot_carry(tmp_path: Path, change: dict[str, Any], overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(replace(job(tmp_path), **change), overrides, [])
    assert caught.value.key == named


def test_a_new_run_needs_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        script(job(tmp_path))
    assert shlex.split(script(job(tmp_path), ["resume=auto"]))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"SLURM_TASKS_PER_NODE": "1(x2),2"}, "SLURM_TASKS_PER_NODE=1(x2),2"),
        ({"SLURM_JOB_CPUS_PER_NODE": "72,36", "SLURM_JOB_NODELIST": "n[1-2]"}, "72,36 on n[1-2]"),
        ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURMD_NODENAME": "n7"}, "SLURM_GPUS_ON_NODE=4 on n7"),
    ],
)
def test_nodes_of_different_sizes_are_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        check_allocation(environ, 8)
    assert named in str(caught.value)


def test_nodes_that_are_alike() -> None:
    alike = {"SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_JOB_CPUS_PER_NODE": "128(x4)", "SLURM_GPUS_ON_NODE": "8"}
    check_allocation(alike, 8)
