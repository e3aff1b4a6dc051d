"""Runs in which one rank's numbers go wrong: rank, module and samples are named, and the run does as it was told."""

from pathlib import Path
from typing import Any

import pytest
from anomaly_tasks import Fault, run_with_faults
from run_configs import tiny_run, write_corpus

STEP = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("anomalies"))


def groups_of(micro: int, **parallel: Any) -> dict[str, Any]:
    return {"parallel": parallel, "train": {"micro_batch_size": micro}}


# The layout, sequences of a micro-batch, and a module on the last rank (of a pipeline, of its last stage).
LAYOUTS = [
    pytest.param(2, 2, {"expert": 2}, id="experts"),
    pytest.param(2, 2, {"pipeline": 2}, id="pipeline"),
    pytest.param(2, 4, {"tensor": 2}, id="tensor"),
]
SLOW = [
    pytest.param(2, 4, {"context": 2}, id="context"),
    pytest.param(2, 2, {"recompute": "full", "accumulate": "reduced"}, id="recompute"),
    pytest.param(4, 1, {"data_replicate": 2, "data_shard": 2, "expert": 2}, id="hybrid"),
    pytest.param(4, 2, {"tensor": 2, "context": 2, "expert": 4}, id="tensor, context, experts"),
    pytest.param(4, 1, {"pipeline": 2, "expert": 2, "pipeline_schedule": "interleaved"}, id="interleaved, experts"),
    pytest.param(4, 1, {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zbv"}, id="zbv, tensor"),
    pytest.param(4, 1, {"pipeline": 2, "expert": 2, "pipeline_schedule": "dualpipev"}, id="dualpipev, experts"),
]
SLOW = [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in SLOW]


def last_rank_with(module: str, ranks: int, parallel: dict[str, Any]) -> int:
    """Of a pipeline in a V, rank 0 holds the last layers."""
    first_stage = parallel.get("pipeline", 1) > 1 and parallel.get("pipeline_schedule") in ("zbv", "dualpipev")
    return ranks // 2 - 1 if first_stage and module.startswith(("layers.3", "lm_head")) else ranks - 1


@pytest.mark.parametrize(("kind", "direction"), [("output", "forward"), ("gradient", "backward")])
@pytest.mark.parametrize(("n", "micro", "parallel"), [*LAYOUTS, *SLOW])
def test_rank_layer_and_sample_are_named(n, micro, parallel, kind, direction, root, ranks, tmp_path):
    """One sequence of one micro-batch, in a module of the last layer of one rank."""
    module = "layers.3.self_attn.o_proj"
    rank = last_rank_with(module, n, parallel)
    fault = Fault(kind, module, rank, STEP, micro=1, row=micro - 1)
    found = ranks(n).run(run_with_faults, tiny_run(root, n, **groups_of(micro, **parallel)), tmp_path, [fault])
    (record,) = found[0]["anomalies"]
    sample = found[rank]["taken"][STEP][1][micro - 1]
    assert record["step"] == STEP
    assert (record["layer"], record["direction"]) == (module, direction)
    assert record["ranks"] == [rank]
    assert record["samples"] == [sample]
    assert record["origins"][0]["sample"] == sample
    assert (record["what"], record["cause"], record["action"]) == ("not_finite", "data or model", "skipped")
    warnings = [line for line in found[0]["printed"].splitlines() if line.startswith("warning:")]
    where = f"{module} ({direction}), on rank {rank}, sample {sample}; the update was skipped on every rank"
    assert len(warnings) == 1, "told once"
    assert warnings[0].endswith(f"first in {where}")
    assert [result["updates"] for result in found] == [2] * n
    assert [r["applied"] for r in found[0]["records"]] == [True, False, True]
