"""Benchmarks are run by hand; what they import must still be there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_exists(path):
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("octofold.")]
    assert ours or not any("octofold" in (node.module or "") for node in imports)
    for node in ours:
        module = import_module(str(node.module))
        for alias in node.names:
            assert hasattr(module, alias.name), f"{path.name}: {node.module} has no {alias.name}"
