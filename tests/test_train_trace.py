"""`octofold trace` beside real runs: what a step holds and sends is what ranks that train it send."""

import json
import subprocess
from typing import Any

import pytest
import torch
from job_processes import COMMAND
from run_configs import write_corpus
from torch._subclasses.fake_tensor import FakeTensorMode

from octofold.launch.cli import main
from octofold.train.trace.memory import MemoryCount


def test_memory_follows_what_is_made_resized_and_let_go():
    memory = MemoryCount("cpu")
    with FakeTensorMode(), memory.following_resizes():
        x = torch.empty(1000)
        memory.see([x, x[:10]])
        assert memory.held_bytes == 4096
        y = x[:10]
        del x
        assert memory.held_bytes == 4096
        y.untyped_storage().resize_(0)
        assert memory.held_bytes == 0
        y.untyped_storage().resize_(512)
        memory.enter("later")
        z = torch.empty(2000)
        memory.see(z)
        assert (memory.held_bytes, memory.peak_bytes, memory.peak_phase) == (512 + 8192, 512 + 8192, "later")
        del y, z
    assert memory.held_bytes == 0


JOB = ["model=deepseek_v3_tiny", "model.vocab_size=512", "data.sequence_length=32", "precision=bf16", "backend=cpu"]
BATCH = ["train.global_batch_size=8", "train.micro_batch_size=1", "parallel.expert=2", "parallel.recompute=full"]
ONE_STEP = ["train.steps=1", "train.log_every=1", "train.eval_every=0", "train.sample_tokens=0"]
ONE_STEP += ["train.final_eval_sequences=4", "optim.warmup_steps=1", "backend.threads=1"]
SHARDS = ("world/all_gather", "world/reduce_scatter", "expert_data/all_gather", "expert_data/reduce_scatter")


def command(verb: str, *arguments: str) -> list[str]:
    return [*COMMAND[:-1], verb, *arguments]


def traced(*overrides: str) -> dict[str, Any]:
    arguments = command("trace", *JOB, *BATCH, "trace.json=true", *overrides)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("per_node", [4, 2])
def test_calls_and_bytes_are_those_of_a_real_run(per_node, tmp_path):
    nodes = f"backend.ranks_per_node={per_node}"
    data = ["data=text", f"data.path={write_corpus(tmp_path) / 'corpus'}", f"data.cache_dir={tmp_path / 'cache'}"]
    real = [*JOB, *BATCH, *ONE_STEP, *data, nodes, "launch.nproc_per_node=4", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command("train", *real), capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = next(line["communication"] for line in lines if line["kind"] == "train")
    costs = traced("trace.ranks=4", nodes)["costs"]
    # All ranks together; shards and gathered weights are alike on each.
    for name in SHARDS:
        assert costs[name]["calls"] * 4 == found[name]["calls"], name
        sent = sum(costs[name]["sent_bytes"].values()) * 4
        assert sent == pytest.approx(sum(found[name]["bytes"].values()), rel=1e-3), name
    # What chance decides is about the same.
    exchange = "expert/all_to_all"
    assert costs[exchange]["calls"] * 4 == found[exchange]["calls"]
    for link, size in found[exchange]["bytes"].items():
        assert costs[exchange]["sent_bytes"][link] * 4 == pytest.approx(size, rel=0.3), link


def test_weights_and_moments_are_the_ranks_share():
    found = traced("trace.ranks=8", "parallel.data_shard=8", "optim.moments=fp32", "model.num_nextn_predict_layers=0")
    total = found["count"]["total"] * 4
    assert found["weights_bytes"] == pytest.approx(total / 8, rel=0.02)
    assert found["gradients_bytes"] == found["weights_bytes"]
    assert found["moments_bytes"] == 2 * found["weights_bytes"]
    assert found["peak_bytes"] > 4 * found["weights_bytes"]


@pytest.mark.slow
def test_fp8_travels_in_fewer_bytes_and_is_kept():
    wide = ["trace.ranks=4", "parallel.recompute=none"]
    plain = traced(*wide)
    quantised = traced(*wide, "precision=fp8_block", "precision.arithmetic=emulate", "precision.block=16")
    sent = [sum(found["costs"]["expert/all_to_all"]["sent_bytes"].values()) for found in (plain, quantised)]
    assert 0.5 < sent[1] / sent[0] < 0.9, "tokens in FP8, outputs in BF16"
    assert quantised["moments_bytes"] == plain["moments_bytes"] // 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.pipeline=2"], "parallel.pipeline=1"),
        (["model.vocab_size=0"], "model.vocab_size=129280"),
        (["backend=cuda"], "backend=cpu traces the layout"),
        (["trace.rank=8"], "trace.rank=7 or less"),
        (["trace.ranks=0"], "trace.ranks=8"),
        (["trace.rnak=1"], "trace.rank"),
        (["parallel.tensor=3"], "parallel"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(overrides, told, capsys):
    assert main(["trace", *JOB, "train.global_batch_size=32", *overrides]) == 2
    assert told in capsys.readouterr().err
