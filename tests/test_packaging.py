"""The package is the tree, its pins are inside their ranges, and it hides nobody else's modules."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CODE = ["backends", "kernels", "parallel", "train", "launch"]
FOLDERS = [*CODE, "configs"]
CONSTRAINTS = ROOT / "constraints"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Of accelerators, and of engines that bring one: each is an extra.
ACCELERATOR_PACKAGES = {"triton", "torch-npu", "deepspeed", "mindspore", "transformer-engine"}


def shipped_files() -> set[str]:
    """Paths from the root of all that a wheel must hold."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    kept = [path.relative_to(ROOT).as_posix() for path in found if path.suffix in (".py", ".yaml", ".cpp", ".h")]
    return {*kept, *(f"{folder}/py.typed" for folder in CODE)}


def requirements(texts: list[str]) -> list[Requirement]:
    """Those of other projects; `octofold[…]` only repeats another extra."""
    return [r for r in map(Requirement, texts) if canonicalize_name(r.name) != "octofold"]


def pins(path: Path) -> dict[str, Version]:
    """Canonical name to version of a constraints file, in which every line pins."""
    pinned: dict[str, Version] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{path.name}: {line} is no pin"
        pinned[canonicalize_name(requirement.name)] = Version(specifier.version)
    return pinned


def constraints_of(extra: str) -> Path:
    """Its own file where it has one, else the base install's."""
    own = CONSTRAINTS / f"{extra}.txt"
    return own if own.exists() else CONSTRAINTS / "base.txt"


def unsatisfied(required: list[Requirement], pinned: dict[str, Version]) -> list[str]:
    """What is required and not pinned, or pinned outside its range."""
    found = []
    for requirement in required:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            found.append(f"{requirement} is pinned at {version}")
    return found


def test_package_list_and_folders_equal_the_tree():
    folders = {Path(path).parent.as_posix() for path in shipped_files()}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(f"octofold.{folder.replace('/', '.')}" for folder in folders)
    directories = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert directories == {f"octofold.{folder}": folder for folder in FOLDERS}


def test_only_configs_is_a_regular_package():
    marked = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    assert marked == ["configs/__init__.py"]
    assert not any((ROOT / folder / "__init__.py").exists() for folder in (".", "tests", "tests/typing/octofold"))


def test_type_checkers_find_the_folders_through_links():
    links = {link.name: os.readlink(link) for link in (ROOT / "tests/typing/octofold").iterdir()}
    assert links == {folder: f"../../../{folder}" for folder in FOLDERS}
    for folder in CODE:
        assert (ROOT / folder / "py.typed").read_bytes() == b""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, since the build leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "wandb", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        packed = {name for name in names if not name.startswith(f"octofold-{PROJECT['version']}.dist-info/")}
        assert packed == {f"octofold/{path}" for path in shipped_files()}
        (license_name,) = [name for name in names if name.endswith("/LICENSE")]
        assert b"Apache License" in archive.read(license_name)


def test_a_wheel_runs_without_the_checkout(wheel, tmp_path):
    """Its own modules compose a job from its own YAML groups."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys
# The environment's editable install would lend the wheel what it lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if "editable" not in path]
from octofold.launch import cli, compose
assert cli.__file__.startswith(sys.argv[1]), cli.__file__
sys.exit(cli.main(["train", "--cfg", "job", "--package", "model.name", "experiment=quickstart"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "moe_10m\n"


def test_other_peoples_modules_import_from_the_repository_root():
    """`python -c` puts the working directory first; Hugging Face's `kernels` must not lose to our folder."""
    code = """
import sys
assert sys.path[0] == ""
import kernels, transformers, transformers.integrations.hub_kernels, octofold.kernels.config
print(kernels.__file__, octofold.kernels.config.__file__, sep="\\n")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = map(Path, done.stdout.splitlines())
    assert "site-packages" in theirs.parts
    assert ours == ROOT / "kernels/config.py"


def test_the_declared_ranges():
    assert PROJECT["requires-python"] == ">=3.11"
    (torch,) = [r for r in requirements(PROJECT["dependencies"]) if r.name == "torch"]
    assert torch.specifier == SpecifierSet(">=2.13,<2.14")


def test_the_base_install_names_no_accelerator_package():
    names = {canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"])}
    assert not names & ACCELERATOR_PACKAGES
    # The extra dev has Triton, whose kernels the tests run in its interpreter.
    assert not pins(CONSTRAINTS / "base.txt").keys() & (ACCELERATOR_PACKAGES - {"triton"})


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_requirement_is_pinned_within_its_range(extra):
    if extra is None:
        assert unsatisfied(requirements(PROJECT["dependencies"]), pins(CONSTRAINTS / "base.txt")) == []
    else:
        pinned = pins(constraints_of(extra))
        assert unsatisfied(requirements(EXTRAS[extra]), pinned) == []
        # An extra comes on top of the base install, so its pins bind there too.
        base = [r for r in requirements(PROJECT["dependencies"]) if canonicalize_name(r.name) in pinned]
        assert unsatisfied(base, pinned) == []


def installed_closure(extras: frozenset[str]) -> set[str]:
    """Canonical names of all that octofold with these extras brings into the running environment."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [("octofold", extras)]
    while waiting:
        name, extras = here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        for requirement in map(Requirement, requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen} - {"octofold"}


def test_all_that_the_tests_run_with_is_pinned():
    assert sorted(installed_closure(frozenset({"dev"})) - pins(CONSTRAINTS / "base.txt").keys()) == []


def test_an_unpinned_or_misplaced_requirement_is_reported():
    pinned = {"torch": Version("2.14.0"), "numpy": Version("2.4.6")}
    required = [Requirement("torch>=2.11,<2.14"), Requirement("NumPy>=1.26"), Requirement("rich")]
    assert unsatisfied(required, pinned) == ["torch<2.14,>=2.11 is pinned at 2.14.0", "rich is pinned at None"]


def test_every_constraints_file_belongs_to_the_base_or_an_extra():
    assert {path.stem for path in CONSTRAINTS.iterdir()} <= {"base", *EXTRAS}
