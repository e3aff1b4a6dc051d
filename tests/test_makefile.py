"""What the make targets promise, in a copy of the repository's set-up files: nothing is installed."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOGETHER = "--dist loadfile --max-worker-restart=0"
REAL_PYTHON = shlex.quote(sys.executable)
REAL_PYTHON = shlex.quote(sys.executable)
# A Python that says it is 3.9 and runs what it is given as such.
OLD_PYTHON = f"""#!/bin/sh
[ "$1" = --version ] && {{ echo Python 3.9.2; exit; }}
exec {REAL_PYTHON} -c 'import sys; sys.version_info = (3, 9, 2, "final", 0); exec(sys.argv[2])' "$@"
"""
# A Python that is new enough and dies while it makes the environment.
DYING_PYTHON = f"""#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && ln -s {REAL_PYTHON} "$3/bin/python" && exit 1 ;;
    *) exec {REAL_PYTHON} "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that make reads, under a path with a space."""
    root = tmp_path / "my checkout"
    shutil.copytree(ROOT / "constraints", root / "constraints")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture
def ready(checkout: Path) -> Path:
    """A checkout whose environment is as make leaves it after `make test`."""
    (checkout / ".venv/bin").mkdir(parents=True)
    for stamp in (".venv/bin/python", ".venv/.base", ".venv/.dev"):
        (checkout / stamp).touch()
    return checkout


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make there, deaf to a make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60)


def executable(path: Path, text: str) -> Path:
    """Write a script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_help_is_the_default_and_shows_the_head_of_the_makefile(checkout):
    shown = make(checkout)
    assert shown.returncode == 0, shown.stderr
    assert make(checkout, "help").stdout == shown.stdout
    head, _, _ = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\n\n")
    assert [f"# {line}".rstrip() for line in shown.stdout.splitlines()] == head.splitlines()
    for name in (
        "make train",
        "make test",
        "make test-slow",
        "make test-ascend",
        "make test-launch",
        "make lint",
        "make clean",
        "PIP_OPTIONS",
        "PYTHON",
    ):
        assert name in shown.stdout


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        (
            "train",
            [
                "octofold train experiment=quickstart run_dir=runs/quickstart resume=auto",
                "octofold report runs/quickstart",
            ],
        ),
        ("test", [f"python -m pytest -n logical --maxprocesses 4 {TOGETHER}"]),
        ("test-slow", [f'python -m pytest -n 2 {TOGETHER} -m "slow and not ascend and not launch" -rP']),
        ("test-launch", ["python -m pytest -m launch"]),
        ("test-launch-short", ['python -m pytest -m "launch and not slow"']),
        ("test-matrix", ["python -m pytest -m matrix -rP"]),
        ("lint", ["ruff check .", "ruff format --check .", "mypy", "hadolint docker/*.Dockerfile"]),
        ("format", ["ruff check --fix .", "ruff format ."]),
    ],
)
def test_a_target_does_what_it_promises_and_no_more(target, commands, ready):
    told = make(ready, "-n", target)
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if not line.startswith("echo ")]
    assert lines == [f".venv/bin/{command}" for command in commands]


@pytest.mark.parametrize(("target", "package"), [("train", "."), ("test", "'.[dev]'"), ("lint", "'.[dev]'")])
def test_on_a_fresh_machine_a_target_first_makes_the_environment(target, package, checkout):
    told = make(checkout, "-n", target, "PIP_OPTIONS=--index-url https://example.org/simple", "PYTHON=python3.12")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    (install,) = [number for number, line in enumerate(lines) if "pip install" in line]
    assert "python3.12 -m venv .venv" in lines[:install]
    assert lines[install].endswith(f"--index-url https://example.org/simple -c constraints/base.txt -e {package}")


def test_torch_npu_has_an_environment_of_its_own(checkout):
    told = make(checkout, "-n", "test-ascend")
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if not line.startswith("echo ")]
    *_, first, second, _, last = lines
    python = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-ascend/bin/python"
    assert all(line.startswith(f"{python} -m pip install") for line in (first, second))
    assert first.endswith("-c constraints/base.txt -e '.[dev]'")
    assert second.endswith("-c constraints/ascend.txt --no-deps torch-npu")
    assert last == f'{python} -m pytest -n 2 {TOGETHER} -m "ascend and not slow"'
    assert ".venv/" not in told.stdout
    assert ".venv-ascend" not in make(checkout, "-n", "test").stdout


def test_nothing_is_installed_again_until_a_pin_changes(ready):
    assert make(ready, "-q", ".venv/.dev").returncode == 0
    assert make(ready, "-q", ".venv/.base").returncode == 0
    later_s = (ready / ".venv/.dev").stat().st_mtime + 10
    os.utime(ready / "constraints/base.txt", (later_s, later_s))
    assert make(ready, "-q", ".venv/.dev").returncode == 1


def test_a_second_call_only_does_its_work(checkout):
    executable(checkout / ".venv/bin/python", '#!/bin/sh\necho "python $*"\n')
    executable(checkout / ".venv/bin/octofold", '#!/bin/sh\necho "octofold $*"\n')
    first, second = make(checkout, "test"), make(checkout, "test")
    assert "pip install" in first.stdout
    suite = f"python -m pytest -n logical --maxprocesses 4 {TOGETHER}"
    assert second.stdout == f"octofold: running the default test suite\n{suite}\n"
    # The test suite's environment is good enough to train in.
    assert make(checkout, "train").stdout.startswith("octofold train experiment=quickstart")


def test_a_failed_install_is_repeated(checkout):
    executable(checkout / ".venv/bin/python", "#!/bin/sh\nexit 3\n")
    for _ in range(2):
        done = make(checkout, "train")
        assert done.returncode == 2
        assert "octofold: installing" in done.stdout
    assert not (checkout / ".venv/.base").exists()


def test_an_old_python_is_refused_with_the_remedy(checkout):
    python = executable(checkout / "bin/python3.9", OLD_PYTHON)
    done = make(checkout, "train", f"PYTHON='{python}'")
    assert done.returncode == 2
    assert "Python 3.9.2" in done.stdout
    assert "octofold: Python 3.11 or newer is needed; name one with PYTHON=..." in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_refused_with_the_remedy(checkout):
    done = make(checkout, "train", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "name one with PYTHON=..." in done.stderr


def test_a_half_made_environment_is_not_taken_for_a_whole_one(checkout):
    python = executable(checkout / "bin/python", DYING_PYTHON)
    done = make(checkout, "train", f"PYTHON='{python}'")
    assert done.returncode == 2
    assert not os.path.lexists(checkout / ".venv/bin/python")
    assert "python' -m venv .venv" in make(checkout, "-n", "train", f"PYTHON='{python}'").stdout


def test_clean_removes_what_make_made_and_no_run_of_the_users(ready):
    made = [".venv", ".venv-ascend", "runs/quickstart", "build", "octofold.egg-info", ".mypy_cache", ".hypothesis"]
    made.append("train/__pycache__")
    kept = ["runs/mine", "train/models", ".git/__pycache__"]
    for folder in (*made, *kept):
        (ready / folder).mkdir(parents=True, exist_ok=True)
        (ready / folder / "file").touch()
    for _ in range(2):
        assert make(ready, "clean").returncode == 0
    assert [folder for folder in made if (ready / folder).exists()] == []
    assert [folder for folder in kept if not (ready / folder / "file").exists()] == []
