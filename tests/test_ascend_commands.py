"""Every verb with `backend=ascend backend.software=true`, in a shell that sets nothing for torch_npu."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from job_processes import COMMAND
from run_configs import write_corpus

pytestmark = pytest.mark.ascend

HERE = ["backend=ascend", "backend.software=true"]
TINY = ["model=tiny", "model.num_hidden_layers=2", "model.vocab_size=320", "parallel.expert=2", "precision=bf16"]


def octofold(*words: str, software: bool = True) -> str:
    """What a command printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    command = [*COMMAND[:-1], *words, *(HERE if software else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two CPU steps."""
    root = tmp_path_factory.mktemp("commands")
    data = ["data=text", f"data.path={write_corpus(root) / 'corpus'}", f"data.cache_dir={root / 'cache'}"]
    brief = ["train.steps=2", "train.log_every=1", "train.eval_every=0", "train.final_eval_sequences=4"]
    brief += ["train.sample_tokens=0", "data.sequence_length=32", "optim.warmup_steps=1", "backend=cpu"]
    octofold("train", *TINY[:3], *data, *brief, f"run_dir={root / 'run'}", software=False)
    return root / "run"


def test_a_run_is_sampled_there_wherever_it_was_trained(run):
    assert octofold("sample", str(run), "def ", "sample.tokens=3").startswith("def ")


def test_a_run_is_exported_imported_and_trained_on(run, tmp_path):
    exported = octofold("export", str(run), f"export.to={tmp_path / 'hf'}").strip()
    imported = octofold("import", exported, f"run_dir={tmp_path / 'run'}", "data.sequence_length=32").strip()
    assert yaml.safe_load((Path(imported) / "config.yaml").read_text())["backend"]["software"] is True
    # The imported run knows where it is to be sampled.
    assert octofold("sample", imported, "def ", "sample.tokens=3", software=False).startswith("def ")


def test_a_run_is_inspected_and_reported(run):
    assert "step       2" in octofold("inspect", str(run))
    assert str(run / "report" / "index.html") in octofold("report", str(run))


def test_the_doctor_knows_that_it_is_a_stand_in():
    said = json.loads(octofold("doctor", "--json"))
    found = {finding["name"]: finding["what"] for finding in said["findings"]}
    assert said["ok"]
    assert "software NPU stands in" in found["cann"]
    assert found["soc"].startswith("8 x software NPU as Ascend 950PR")


@pytest.mark.parametrize(
    ("subject", "answer"),
    [("layout", "compute what one rank does? yes"), ("resume", "the same run? yes")],
)
def test_layout_and_resume_are_verified_on_npu_ranks(subject, answer, tmp_path):
    shown = octofold("verify", subject, *TINY, "verify.steps=2", f"run_dir={tmp_path}")
    assert answer in shown
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["backend"]["name"] == "ascend"
