"""Collectives are issued by backends/collectives.py and no other place above it, so that they have one face."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "parallel", "train", "launch")
CALLS = {
    *("all_reduce", "all_gather", "all_gather_single", "all_gather_object", "all_gather_into_tensor", "all_to_all"),
    *("all_to_all_single", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "irecv", "isend"),
    *("barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter"),
    *("send", "monitored_barrier", "gather_object", "scatter_object_list"),
}
ELSEWHERE = {
    # Plans of torch's checkpoint, which are Python objects, on a group of its own beside training.
    ("train/checkpoint/storage.py", "all_gather_object"),
    ("train/checkpoint/storage.py", "broadcast_object_list"),
}


def test_collectives_above_backends_are_those_of_backends():
    found = set()
    for path in (
        path for folder in ("kernels", "parallel", "train", "launch") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "dist":
                found |= {(path.relative_to(ROOT).as_posix(), call.attr)} if call.attr in CALLS else set()
    assert found == ELSEWHERE
