"""The images: built from files that are there, run by a number that is not root's, and installable step by step."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMAGES = sorted(path.stem for path in (ROOT / "docker").glob("*.Dockerfile"))


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = (ROOT / f"docker/{image}.Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", "", re.sub(r"(?m)^ *#.*\n", "", text)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def sent(image: str) -> list[str]:
    """Files, from the root, that the engine is sent: what git tracks and the image's .dockerignore lets through."""
    rules = (ROOT / f"docker/{image}.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    return [p for p in tracked if any(p == rule or p.startswith(f"{rule}/") for rule in allowed)]


def build_stage(image: str) -> list[tuple[str, str]]:
    """What makes /opt/octofold."""
    found = instructions(image)
    starts = [number for number, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[0] + 1 : starts[1]]


def test_there_is_an_image_for_each_backend():
    assert IMAGES == ["ascend", "cpu", "cuda"]


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_sent_and_makes_the_package(image):
    files = sent(image)
    for word, rest in build_stage(image):
        if word == "COPY":
            *sources, _ = rest.split()
            assert all(source == "." or source in files for source in sources), rest
    packages = {path.split("/")[0] for path in files if path.endswith(".py")}
    assert packages == {"backends", "kernels", "parallel", "train", "launch", "configs"}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints/base.txt"} <= set(files)
    assert not [path for path in files if path.startswith(("tests/", "docs/", "docker/"))]


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_is_labelled_checked_and_never_root(image):
    found = instructions(image)
    last = dict(found)
    assert last["USER"] == "1000:1000"  # a number, which Kubernetes can hold to runAsNonRoot
    assert last["ENTRYPOINT"] == '["octofold"]'
    assert "HEALTHCHECK" in last
    for name in ("licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}" in last["LABEL"]
    bases = {rest.split()[0] for word, rest in found if word == "FROM"}
    (variable,) = bases  # one base, which a build may pin by digest
    default = next(rest for word, rest in found if word == "ARG" and rest.startswith(variable.strip("${}")))
    assert fnmatch.fnmatch(default, "*=*:*.*")
    assert not default.endswith(":latest")


@pytest.mark.parametrize("image", IMAGES)
def test_dependencies_are_a_layer_of_their_own(image):
    words = [(word, rest) for word, rest in build_stage(image) if word in ("COPY", "RUN")]
    everything = next(number for number, (word, rest) in enumerate(words) if (word, rest) == ("COPY", ". ."))
    assert any("requirements.txt" in rest and "install" in rest for word, rest in words[:everything] if word == "RUN")
    assert all("-c constraints/" in rest for word, rest in words if "pip install" in rest)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_install_steps_of_the_cpu_image_make_an_octofold_that_works(tmp_path):
    """There is no engine here to build with: the steps run as a script, and doctor is the smoke test."""
    source, target, tools = tmp_path / "src", tmp_path / "opt/octofold", tmp_path / "bin"
    for folder in (source, target.parent, tools):
        folder.mkdir(parents=True)
    (tools / "python").symlink_to(getattr(sys, "_base_executable", sys.executable))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "PATH": f"{tools}:{os.environ['PATH']}", "PIP_OPTIONS": os.environ.get("PIP_OPTIONS", "")}
    for word, rest in build_stage("cpu"):
        if word == "COPY":
            *sources, place = rest.split()
            for path in sent("cpu") if sources == ["."] else sources:
                goal = source / path if sources == ["."] else source / place / Path(path).name
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, goal)
        elif word == "RUN":
            script = rest.replace("/opt/octofold", str(target))
            subprocess.run(["sh", "-euc", script], cwd=source, env=environment, check=True)
    octofold = target / "bin/octofold"
    runs = tmp_path / "runs"
    assert subprocess.check_output([octofold, "--version"], cwd=tmp_path, env=kept, text=True).startswith("octofold ")
    doctor = subprocess.run([octofold, "doctor", runs], cwd=tmp_path, env=kept, capture_output=True, text=True)
    python = [line for line in doctor.stdout.splitlines() if re.match(r"ok\s+(python|torch)\b", line)]
    assert len(python) == 2, doctor.stdout
    assert doctor.returncode == 0, doctor.stdout
    short = ["train.steps=2", "train.final_eval_sequences=4", "train.sample_tokens=0", "data.sequence_length=32"]
    trained = [octofold, "train", "model=tiny", *short, "data.tokenizer=bytes", f"run_dir={runs / 'tiny'}"]
    subprocess.run(trained, cwd=tmp_path, env=kept, check=True, timeout=300)
