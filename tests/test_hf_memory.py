"""Converting a checkpoint of gigabytes takes no more memory than a few slabs (it writes some 15 GB)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONVERT = Path(__file__).parent.parent / "benchmarks" / "convert.py"
CONSTANT_BYTES = 128 * 2**20
"""Slabs, what they become on their way, and what the allocator keeps."""


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_memory_is_bounded_by_slabs_and_not_by_the_model(tmp_path):
    command = [sys.executable, str(CONVERT), "--layers", "1", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["total_bytes"] > 4e9
    for name in ("import bf16", "export bf16", "export fp8", "import fp8"):
        extra = figures[name]["extra_bytes"]
        assert extra < 2 * figures["largest_bytes"] + CONSTANT_BYTES, (name, extra)
        # And in fact without any of a tensor's size.
        assert extra < CONSTANT_BYTES, (name, extra)
