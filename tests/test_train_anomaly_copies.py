"""Silent corruption: a bit that flips in one copy, a product that errs once; who it was is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomaly_tasks import Fault, run_with_faults
from hypothesis import given
from hypothesis import strategies as st
from run_configs import tiny_run, write_corpus
from run_tasks import run
from test_train_anomaly_run import policy
from test_train_loss_scale_run import assert_same_tensors, curve

from octofold.train.anomaly.bits import checksum


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("copies"))


def checked(micro: int, model: dict[str, Any] | None = None, **parallel: Any) -> dict[str, Any]:
    train = {"micro_batch_size": micro, "check_replicas_every": 1}
    return {"parallel": parallel, "train": train, "model": model or {}}


TIED = {"tie_word_embeddings": True}
# The layout, what is flipped on which rank, and the ranks that are named: both where there are two copies.
CASES = [
    pytest.param(2, checked(4, data_replicate=2), "layers.1.self_attn.o_proj", 1, [0, 1], id="replica of two"),
    pytest.param(2, checked(2, TIED, pipeline=2), "embed_tokens", 1, [0, 1], id="copy on the last stage"),
    pytest.param(4, checked(2, tensor=2, context=2), "layers.2.mlp.gate", 2, [2], id="expert bias of four ranks"),
    pytest.param(4, checked(2, data_replicate=4), "lm_head", 3, [3], id="replica of four", marks=pytest.mark.slow),
    pytest.param(
        4, checked(2, expert=4), "layers.1.mlp.gate", 0, [0], id="expert bias, experts", marks=pytest.mark.slow
    ),
    pytest.param(
        4,
        checked(2, TIED, pipeline=2, pipeline_schedule="zbv", data_replicate=2),
        "embed_tokens",
        1,
        [1],
        id="copy on the same rank",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("n", "groups", "module", "rank", "named"), CASES)
def test_a_flipped_bit_in_one_copy_is_found(n, groups, module, rank, named, root, ranks, tmp_path):
    """At the step at which it happens: the numbers of that step may be anything, but copies still differ."""
    fault = Fault("bit", module, rank, step=2)
    found = ranks(n).run(run_with_faults, tiny_run(root, n, **groups), tmp_path, [fault])
    (record,) = found[0]["anomalies"]
    assert (record["what"], record["cause"], record["action"]) == ("replicas", "replicas", "stopped")
    assert (record["step"], record["ranks"]) == (2, named)
    for result in found:
        assert result["error"].startswith("step 2: ")
        assert f"copies of {record['layer']} that must be equal differ" in result["error"]


@pytest.mark.parametrize("n", [2])
@pytest.mark.slow
def test_checks_and_rechecks_change_nothing_and_find_nothing(n, root, ranks, tmp_path):
    """With accumulation and recorded precision health, in FP8: every bit is that of the run without them."""
    groups: dict[str, Any] = {"parallel": {"data_replicate": n}, "checkpoint": {"every_steps": 2}}
    groups["precision"] = {"name": "fp8_tensor_delayed", "arithmetic": "emulate", "block": 16, "watch_every": 2}
    runs = {}
    for every in (0, 1):
        train = {"micro_batch_size": 2, "check_replicas_every": every, "recheck_every": every}
        runs[every] = ranks(n).run(run, tiny_run(root, n, train=train, **groups), tmp_path / str(every))[0]
    assert_same_tensors(runs[1]["tensors"], runs[0]["tensors"])
    assert curve(runs[1]["records"]) == curve(runs[0]["records"])
    for ours, theirs in zip(runs[1]["records"], runs[0]["records"], strict=True):
        assert ours.get("precision_health") == theirs.get("precision_health")


def test_copies_that_differ_send_a_run_back(root, ranks, tmp_path):
    """It ends as the run without the flip does."""
    groups = policy("rollback", check_replicas_every=1) | {"parallel": {"data_replicate": 2}}
    config = tiny_run(root, 2, **groups)
    fault = Fault("bit", "layers.1.self_attn.o_proj", 1, step=4)
    found = ranks(2).run(run_with_faults, config, tmp_path / "flipped", [fault])[0]
    (record,) = found["anomalies"]
    assert (record["action"], record["to_step"]) == ("rolled_back", 2)
    expected = ranks(2).run(run, config, tmp_path / "sound")[0]
    assert_same_tensors(found["tensors"], expected["tensors"])
    assert curve(found["records"]) == curve(expected["records"])


# The layout, and sequences of a micro-batch.
LAYOUTS = [
    pytest.param(2, 2, {"expert": 2}, id="experts"),
    pytest.param(2, 4, {"tensor": 2}, id="tensor", marks=pytest.mark.slow),
    pytest.param(2, 2, {"pipeline": 2}, id="pipeline", marks=pytest.mark.slow),
    pytest.param(4, 1, {"data_replicate": 2, "expert": 2}, id="hybrid", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("n", "micro", "parallel"), LAYOUTS)
@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_rank_that_errs_once_is_named(in_pass, n, micro, parallel, root, ranks, tmp_path):
    """By a millionth, in one product of one sequence, the first time or the second: no norm or loss would show it."""
    fault = Fault("off", "layers.3.self_attn.o_proj", n - 1, step=2, micro=1, passes=in_pass, first=in_pass - 1)
    train = {"micro_batch_size": micro, "recheck_every": 2}
    found = ranks(n).run(run_with_faults, tiny_run(root, n, train=train, parallel=parallel), tmp_path, [fault])[0]
    (record,) = found["anomalies"]
    assert (record["what"], record["cause"], record["action"]) == ("recheck", "device", "skipped")
    assert (record["ranks"], record["layer"]) == ([n - 1], "layers.3.self_attn.o_proj")
    assert record["direction"] == "forward"


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]),
    st.integers(1, 300),
    st.data(),
)
def test_every_bit_counts(dtype, size, data):
    generator = torch.Generator().manual_seed(size)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=generator)
    tensor, changed = raw.clone().view(dtype), raw.clone()
    changed[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensor) == checksum(raw.view(dtype))
    assert checksum(tensor) != checksum(changed.view(dtype))
