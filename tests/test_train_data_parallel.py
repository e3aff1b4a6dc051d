"""The options of data parallelism: the same gradients, the communication and the memory that each promises."""

from dataclasses import replace
from typing import Any

import pytest
import recompute_tasks
import run_tasks
import torch
from run_configs import tiny_run, write_corpus
from tiny_models import SMALL

from octofold.backends.errors import ConfigError
from octofold.parallel.config import ParallelConfig
from octofold.train.config import PrecisionConfig

MODEL = replace(SMALL, n_shared_experts=1)
DEEP = replace(MODEL, num_hidden_layers=6)
FP64, FP32 = PrecisionConfig("fp64"), PrecisionConfig("fp32")
OPTIONS = [
    {"reshard_after_forward": reshard, "accumulate": accumulate}
    for reshard in (True, False)
    for accumulate in ("unreduced", "reduced")
]
GATHER, SCATTER, REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"


@pytest.fixture(scope="module")
def one_rank(ranks) -> dict[str, Any]:
    """Three updates on one rank, in one micro-batch."""
    return ranks(1).run(recompute_tasks.step, MODEL, ParallelConfig(), FP64, 8)[0]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        assert difference < tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(
    ("n", "parallel"),
    [
        pytest.param(2, ParallelConfig(expert=2), id="2 ranks, split experts"),
        pytest.param(4, ParallelConfig(data_replicate=2, expert=2), id="2 replicas of 2 ranks, split experts"),
    ],
)
def test_every_option_gives_the_gradients_of_one_rank(ranks, one_rank, n, parallel):
    """In micro-batches of one sequence; and issues the collectives that it promises."""
    micro_batches = recompute_tasks.SEQUENCES // n
    counts = {}
    for options in OPTIONS:
        found = ranks(n).run(recompute_tasks.step, MODEL, replace(parallel, **options), FP64, 1)[0]
        assert found["loss"] == pytest.approx(one_rank["loss"], rel=1e-12)
        assert_close(found["gradients"], one_rank["gradients"], 1e-9)
        counts[tuple(options.values())] = found["collectives"]
    # Layers, and what belongs to none, which stays gathered from the forward pass to the backward; each expert is
    # whole on its rank.
    layers = MODEL.num_hidden_layers
    for (reshard, accumulate), times in counts.items():
        assert times[GATHER] == ((2 * layers + 1) * micro_batches if reshard else layers + 1)
        assert times[SCATTER] == (layers + 1) * (micro_batches if accumulate == "reduced" else 1)
        assert times.get(REDUCE, 0) == counts[True, "unreduced"].get(REDUCE, 0), "replicas sum once a step"
    assert (REDUCE in counts[True, "reduced"]) == (parallel.data_replicate > 1)


def test_memory_that_each_option_needs(ranks):
    def gathered(micro: int, **options: Any) -> int:
        parallel = ParallelConfig(expert=2, **options)
        return ranks(2).run(recompute_tasks.need, DEEP, parallel, PrecisionConfig("bf16"), micro)[0].gathered_bytes

    alone, unreduced, reduced = gathered(4), gathered(1), gathered(1, accumulate="reduced")
    assert reduced == alone, "accumulating shards takes no more than not accumulating"
    assert unreduced > reduced, "whole gradients of all layers wait for the last micro-batch"
    stays = gathered(1, accumulate="reduced", reshard_after_forward=False)
    # In BF16 a weight that stays takes half of what its unreduced gradient does.
    assert reduced < stays < unreduced
    assert gathered(4, reduce_dtype="bf16") < alone


def test_gradients_summed_in_bf16(ranks):
    """Over 2 ranks: one rounding of each of the two parts and one of the sum, added up over micro-batches in FP32."""
    exact = ranks(2).run(recompute_tasks.step, MODEL, ParallelConfig(), FP32, 2)[0]["gradients"]
    options = ParallelConfig(reduce_dtype="bf16", accumulate="reduced")
    found = ranks(2).run(recompute_tasks.step, MODEL, options, FP32, 2)[0]["gradients"]
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert any(not torch.equal(found[name], gradient) for name, gradient in exact.items())
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() < 2**-7 * gradient.norm(), name


@pytest.mark.parametrize("reshard", [True, False])
def test_an_evaluation_leaves_no_weight_gathered(ranks, reshard, tmp_path):
    """What is saved after it are shards in the master dtype and their moments."""
    write_corpus(tmp_path, documents=20)

    def config(eval_every: int) -> Any:
        train = {"steps": 2, "eval_every": eval_every, "eval_sequences": 2}
        parallel = {"expert": 2, "reshard_after_forward": reshard}
        groups: dict[str, Any] = {"precision": {"name": "bf16"}, "checkpoint": {"every_steps": 1}}
        return tiny_run(tmp_path, 2, train=train, parallel=parallel, **groups)

    expected = ranks(2).run(run_tasks.run, config(0), tmp_path / "plain")[0]["tensors"]
    found = ranks(2).run(run_tasks.run, config(1), tmp_path / "evaluated")[0]["tensors"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def test_refused_by_name(tmp_path):
    write_corpus(tmp_path, documents=1)

    def refused(**groups: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            tiny_run(tmp_path, 2, **groups)
        return str(caught.value)

    assert refused(parallel={"accumulate": "reduce"}).startswith("parallel.accumulate=reduce\n")
    assert "none, swiglu, selective, full" in refused(parallel={"recompute": "blocks"})
    pipeline = {"pipeline": 2, "accumulate": "reduced"}
    assert refused(parallel=pipeline).startswith("parallel.accumulate=reduced parallel.pipeline=2\n")
    bf16 = {"parallel": {"reduce_dtype": "bf16"}}
    assert "under fp64 gradients are summed in FP64" in refused(**bf16)
    message = refused(**bf16, precision={"name": "bf16"}, train={"micro_batch_size": 1})
    assert "parallel.accumulate=unreduced train.global_batch_size=8 train.micro_batch_size=1" in message
    tiny_run(tmp_path, 2, **bf16, precision={"name": "bf16"})
    reduced = {"parallel": {"reduce_dtype": "bf16", "accumulate": "reduced"}}
    tiny_run(tmp_path, 2, **reduced, precision={"name": "bf16"}, train={"micro_batch_size": 1})
