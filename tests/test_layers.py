"""The layers keep their order, the parts of train/ stay strangers, configurations need no torch, imports do nothing."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first; a folder imports from itself and from its left. Only the command line stands above the YAML groups.
LAYERS = ["backends", "kernels", "parallel", "train", "configs", "launch"]
PARTS_OF_TRAIN = {"models", "data", "optim", "checkpoint", "engines"}
# Not `octofold.data`, which names a log.
DOTTED = re.compile(rf"octofold\.({'|'.join(LAYERS)})\b[.:\w]*")
SOURCES = sorted(path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, wherever it stands, and of all that its registries name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            # In `from octofold import train` the layer is among the names.
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.lineno, node.value


def broken_rule(importer: tuple[str, ...], name: str) -> str | None:
    """The rule that the import of `name` by the file with these path parts breaks."""
    top, layer, part = [*re.split(r"[.:]", name), "", ""][:3]
    if name.startswith("."):
        return "imports are absolute"
    if top in LAYERS:
        return f"the folder imports as octofold.{top}"
    if top != "octofold":
        return None
    if layer not in LAYERS:
        return f"octofold has {', '.join(LAYERS)}"
    if LAYERS.index(layer) > LAYERS.index(importer[0]):
        return f"{importer[0]} is below {layer}"
    if importer[0] == layer == "train" and importer[1] in PARTS_OF_TRAIN and part in PARTS_OF_TRAIN - {importer[1]}:
        return f"{importer[1]} and {part} are joined by build.py alone"
    return None


def violations(path: Path, source: str) -> list[str]:
    """What a file imports against the rules, as `path:line: name: rule`.

    Args:
        path: relative to the repository root, such as train/data/loader.py.
        source: its text.
    """
    imported = imported_names(ast.parse(source))
    return [f"{path}:{line}: {name}: {rule}" for line, name in imported if (rule := broken_rule(path.parts, name))]


def test_no_file_imports_against_the_layers():
    found = [text for path in SOURCES for text in violations(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    ("kernels/permute.py", "import octofold.parallel.mesh", "kernels is below parallel"),
    ("backends/cpu.py", "def f():\n    from octofold.kernels.registry import choose", "backends is below kernels"),
    ("train/loop.py", "from octofold import launch", "train is below launch"),
    ("parallel/apply.py", "if TYPE_CHECKING:\n    from octofold.train.config import A", "parallel is below train"),
    ("kernels/registry.py", "P = {'a': 'octofold.train.models.moe:forward'}", "kernels is below train"),
    ("kernels/registry.py", "m = import_module(f'octofold.train.{name}')", "kernels is below train"),
    ("train/data/loader.py", "from octofold.train.models.moe import Gate", "joined by build.py alone"),
    ("train/optim/adamw.py", "from octofold.train import engines", "joined by build.py alone"),
    ("train/config.py", "import octofold.configs", "train is below configs"),
    ("train/build.py", "from .config import RunConfig", "imports are absolute"),
    ("train/build.py", "from . import config", "imports are absolute"),
    ("launch/cli.py", "from train.config import RunConfig", "octofold.train"),
    ("train/build.py", "import kernels", "octofold.kernels"),
    ("launch/cli.py", "import octofold", "octofold has backends"),
    ("launch/cli.py", "from octofold.tests import helper", "octofold has backends"),
]


@pytest.mark.parametrize(("path", "source", "rule"), PLANTED)
def test_a_planted_import_is_reported(path, source, rule):
    (found,) = violations(Path(path), f'"""octofold.launch is only mentioned here."""\n{source}\n')
    assert found.startswith(f"{path}:{1 + source.count(chr(10)) + 1}: ")
    assert rule in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launch/train.py", "import octofold.configs"),
        ("train/build.py", "from octofold.train.models.decoder import Decoder"),
        ("train/data/loader.py", "from octofold.train.data.batch import Batch"),
        ("train/optim/adamw.py", "from octofold.train.config import OptimConfig"),
        ("train/models/moe.py", "import torch, numpy.linalg\nfrom transformers import kernels"),
    ],
)
def test_a_lawful_import_is_not(path, source):
    assert violations(Path(path), source) == []


def run_python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter that keeps nothing of what it compiles."""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configurations_are_torch_free(tmp_path):
    modules = [name for name in map(module_name, SOURCES) if name.endswith(".config")]
    assert {"octofold.launch.config", "octofold.train.config"} <= set(modules)
    code = f"""
import json, sys
before = set(sys.modules)
import {", ".join(modules)}
print(json.dumps([*sys.modules.keys() - before]))
"""
    tops = {name.partition(".")[0] for name in json.loads(run_python(code, tmp_path))}
    assert tops <= sys.stdlib_module_names | {"octofold"}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(["octofold", *(parts[:-1] if parts[-1] == "__init__" else parts)])


INERT = """
import importlib, os, signal, sys, threading

def watch(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and arguments[0] != os.devnull
    makes = event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.truncate")
    if writes or makes or event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "os.fork"):
        deeds.append(f"{name}: {event} {arguments}")

def state():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    return dict(os.environ), handlers, os.getcwd(), [t.name for t in threading.enumerate()]

def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled())

import torch
torch.manual_seed(1)
deeds, before = [], (state(), settings())
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
    if (state(), settings()) != before:
        deeds.append(f"{name}: the state of the process changed")
        before = (state(), settings())
if torch.distributed.is_initialized():
    deeds.append("a process group was made")
print("\\n".join(deeds), end="")
"""


def import_all(names: list[str], cwd: Path) -> str:
    """What importing the modules one after the other did besides defining things: a line for each deed."""
    return run_python(f"import sys; sys.argv[1:] = {names!r}\n{INERT}", cwd)


def test_imports_are_inert(tmp_path):
    assert import_all([module_name(path) for path in SOURCES], tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_acts_is_reported(tmp_path):
    acting = {
        "writes": ("open('x', 'w')", "open ('x'"),
        "sets_variable": ("import os; os.environ['OCTOFOLD_X'] = '1'", "the state of the process changed"),
        "sets_threads": ("import torch; torch.set_num_threads(3)", "the state of the process changed"),
        "binds": ("import socket; socket.socket().bind(('localhost', 0))", "socket.bind"),
        "lawful": ("import json, pathlib; open(__file__)", ""),
    }
    for name, (deed, _) in acting.items():
        (tmp_path / f"{name}.py").write_text(deed, encoding="utf-8")
    deeds = import_all(list(acting), tmp_path)
    for name, (_, told) in acting.items():
        assert (f"{name}: {told}" in deeds) == bool(told), deeds
