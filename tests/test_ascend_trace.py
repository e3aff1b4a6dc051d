"""`octofold trace` on NPU tensors: torch_npu's operators by its own meta kernels, up to the largest model."""

import json
import os
import subprocess
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import pytest
from job_processes import COMMAND

pytestmark = pytest.mark.ascend

LARGEST = ["model=octofold_1t", "trace.ranks=2048", "parallel.expert=64", "backend.ranks_per_node=16"]
LARGEST += ["data.sequence_length=4096", "train.micro_batch_size=1", "train.global_batch_size=2048"]
LARGEST += ["precision=bf16", "parallel.recompute=full"]


def traced(*overrides: str) -> dict[str, Any]:
    arguments = [*COMMAND[:-1], "trace", "backend=ascend", "backend.software=true", "trace.json=true", *overrides]
    done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_largest_model_at_2048_ranks_in_8_gb():
    found = traced(*LARGEST)
    print(f"traced in {found['seconds']:.0f} s")
    assert {found["kernels"][op] for op in ("attention", "grouped_mm", "rms_norm", "gate_topk", "permute")} == {"npu"}
    assert found["count"]["total"] > 1e12
    held = found["weights_bytes"] + found["gradients_bytes"] + found["moments_bytes"]
    assert held < found["peak_bytes"] < 64 * 2**30
    assert set(found["costs"]["expert/all_to_all"]["sent_bytes"]) == {"node", "network"}
    # Kilobytes, of the largest process so far.
    assert getrusage(RUSAGE_CHILDREN).ru_maxrss * 1024 < 8e9
