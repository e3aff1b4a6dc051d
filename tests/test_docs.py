"""The tutorial's code is run as it stands: files written where a reader would write them, commands typed as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def tutorial(page: str) -> tuple[dict[str, str], list[str]]:
    """The files a page asks for, by name, and its commands in order."""
    files, commands = {}, []
    for language, name, body in BLOCK.findall((DOCS / page).read_text()):
        if language == "python":
            files[name] = body
        if language == "console":
            commands += [line.removeprefix("$ ") for line in body.splitlines()]
    return files, commands


FILES, COMMANDS = tutorial("extending.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's own folder with the tutorial's files."""
    where = tmp_path_factory.mktemp("tutorial")
    for name, text in FILES.items():
        (where / name).write_text(text)
    return where


def test_the_tutorial_has_all_three_parts() -> None:
    assert set(FILES) >= {"side_by_side.py", "plain_swiglu.py", "one_thread.py"}
    assert sum("octofold train" in command for command in COMMANDS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("run_dir=")[-1])
def test_command(command: str, folder: Path) -> None:
    here = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    if "run_dir=" in command:
        run = folder / command.split("run_dir=")[1].split()[0]
        assert list(run.glob("checkpoints/step_*/manifest.json"))


def test_pages_named_in_the_documents_exist() -> None:
    root = DOCS.parent
    for page in [*DOCS.glob("*.md"), root / "README.md", root / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for path in re.findall(
            r"`((?:docs|tests|benchmarks|train|launch|kernels|parallel|backends|configs)/[\w./]+)`", page.read_text()
        ):
            if path.endswith((".py", ".md", ".yaml")) and not path.endswith("/x.py") and "/x." not in path:
                assert (root / path).exists(), f"{page.name} names {path}"
