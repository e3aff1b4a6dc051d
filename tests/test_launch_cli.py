"""The command as a user meets it: help at once, one message for a mistake, and an exit status that means something."""

import subprocess
import sys
from pathlib import Path

import pytest

from octofold.launch.cli import main

OCTOFOLD = Path(sys.executable).with_name("octofold")


def octofold(*arguments, cwd):
    """Run the installed command."""
    return subprocess.run([OCTOFOLD, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty working directory that must stay empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    yield tmp_path
    assert not list(tmp_path.iterdir())


HELP = [
    ["--help"],
    ["train", "--help"],
    ["sample", "-h"],
    ["report", "--help"],
    ["doctor", "-h"],
    ["rank-table", "--help"],
    ["train", "model=tiny", "--help"],
]


@pytest.mark.parametrize("arguments", HELP)
def test_help_goes_to_stdout(arguments, cwd, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: octofold ")


def test_no_verb_is_a_mistake(cwd, capsys):
    assert main([]) == 2
    assert "usage: octofold" in capsys.readouterr().err


def test_help_and_version_import_nothing_heavy(cwd):
    code = """
import sys
from octofold.launch.cli import main
for arguments in (["--help"], ["train", "--help"], ["--version"]):
    main(arguments)
heavy = {"torch", "hydra", "omegaconf", "rich", "numpy", "yaml"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "octofold 0." in done.stdout


def test_a_wrong_config_ends_before_torch_is_imported(cwd):
    code = """
import sys
from octofold.launch.cli import main
status = main(["train", "parallel.data_shard=3"])
sys.exit(status if "torch" not in sys.modules else 99)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


MISTAKES = [
    (["trian"], "remedy: octofold train"),
    (["train", "launch=slurm"], "octofold launch launch=slurm"),
    (["frobnicate"], "train, launch, sample, status, report"),
    (["train", "train.stepz=5"], "remedy: train.steps=5"),
    (["train", "model=tinny"], "remedy: model=tiny"),
    (["train", "train.global_batch_size=7"], "multiple of micro batch"),
    (["train", "--bogus"], "--bogus"),
    (["train", "--cfg", "hydra"], "invalid choice"),
    (["train", "--cfg", "job", "--package", "train.stepz"], "--package train.steps"),
    (["train", "--multirun", "train.seed=0,1", "run_dir=same"], "folder of its own"),
    (["train", "--multirun", "train.seed=0,1", "parallel.data_shard=1,3"], "the job has 1 rank"),
    (["sample", "only-a-run"], "RUN 'PROMPT'"),
    (["sample", "nowhere", "a = b"], "holds no run"),
    (["sample", "nowhere", "a", "sample.tokens=few"], "a whole number"),
    (["sample", "nowhere", "a", "sample.tokens=0"], "at least one token"),
    (["sample", "nowhere", "a", "sample.temperature=-1"], "not negative"),
    (["report"], "octofold report RUN"),
    (["report", "nowhere"], "not a run folder"),
    (["-sc", "query=tcsh"], "bash, fish, zsh"),
]


@pytest.mark.parametrize(
    ("arguments", "part"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_costs_one_message_and_status_2(arguments, part, cwd, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("octofold: ")
    assert part in said.err


def test_the_installed_command_shows_no_traceback(cwd):
    done = octofold("train", "train.steps=abc", cwd=cwd)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "train.steps is a whole number" in done.stderr


def test_the_configuration_is_shown_whole_or_in_part(cwd):
    from omegaconf import OmegaConf

    done = octofold("train", "--cfg", "job", "experiment=quickstart", "train.eval_every=${train.steps}", cwd=cwd)
    shown = OmegaConf.create(done.stdout)
    assert (shown.model.name, shown.train.eval_every, shown.launch.nproc_per_node) == ("moe_10m", 600, 2)
    assert octofold("train", "--cfg", "job", "-p", "train.steps", cwd=cwd).stdout == "500\n"
    part = octofold("train", "--cfg", "job", "--package", "optim", cwd=cwd).stdout
    assert OmegaConf.create(part).schedule == "cosine"


def test_info_tells_how_the_job_is_composed(cwd):
    done = octofold("train", "--info", "defaults-tree", "model=moe_10m", cwd=cwd)
    assert done.returncode == 0
    assert "model: moe_10m" in done.stdout


def test_a_run_without_a_checkpoint_has_no_sample(tmp_path, capsys):
    from octofold.launch.config import JobConfig
    from octofold.launch.run_folder import write_config

    write_config(tmp_path, JobConfig())
    assert main(["sample", str(tmp_path), "--help me"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
