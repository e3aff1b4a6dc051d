"""Which stage holds what, on which rank, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError
from octofold.parallel.config import ParallelConfig, resolve
from octofold.parallel.pipeline_split import SCHEDULES, check_pipeline, rank_of_stage, split_layers, stages_a_rank


def config(pipeline: int, schedule: str = "1f1b", **more: Any) -> ParallelConfig:
    return ParallelConfig(pipeline=pipeline, data_shard=1, pipeline_schedule=schedule, **more)


def counts(parallel: ParallelConfig, layers: int, depths: int = 0) -> list[int]:
    return [len(part.layers) for part in split_layers(parallel, layers, depths)]


def test_stages_stand_in_a_loop_or_in_a_v():
    assert rank_of_stage(config(3)) == [0, 1, 2]
    assert rank_of_stage(config(2, "interleaved", pipeline_stages=3)) == [0, 1, 0, 1, 0, 1]
    assert rank_of_stage(config(3, "zbv")) == rank_of_stage(config(3, "dualpipev")) == [0, 1, 2, 2, 1, 0]
    assert [stages_a_rank(config(2, name)) for name in SCHEDULES] == [1, 1, 2, 2, 2]
    assert stages_a_rank(config(1, "zbv")) == 1


def test_an_even_split_counts_what_stands_at_the_ends():
    assert counts(config(4), 8) == [3, 2, 2, 1]
    assert counts(config(4), 7) == [2, 2, 2, 1]
    assert counts(config(2), 8, depths=1) == [6, 2]
    assert counts(config(2, pipeline_embedding_layers=3.0, pipeline_head_layers=0.0), 9) == [3, 6]
    assert counts(config(2, pipeline_split=[1, 7]), 8) == [1, 7]
    assert counts(config(2, "zbv"), 61) == [16, 16, 15, 14]


@given(
    pipeline=st.integers(2, 8),
    schedule=st.sampled_from(list(SCHEDULES)),
    extra=st.integers(0, 40),
    depths=st.integers(0, 2),
    ends=st.tuples(st.floats(0, 5), st.floats(0, 5)),
)
def test_an_even_split_holds_every_layer_once_and_no_other_is_lighter(pipeline, schedule, extra, depths, ends):
    parallel = config(pipeline, schedule, pipeline_embedding_layers=ends[0], pipeline_head_layers=ends[1])
    stages = pipeline * stages_a_rank(parallel)
    parts = split_layers(parallel, stages + extra, depths)
    assert [layer for part in parts for layer in part.layers] == list(range(stages + extra))
    assert [part.first for part in parts] == [True] + [False] * (stages - 1)
    assert [part.last for part in parts] == [False] * (stages - 1) + [True]
    loads = [float(len(part.layers)) for part in parts]
    loads[0] += ends[0]
    loads[-1] += ends[1] * (1 + depths) + depths
    fullest = max(loads)
    # Whatever is fuller than another by more than a layer has but the one layer that it must have.
    for load, part in zip(loads, parts, strict=True):
        assert len(part.layers) >= 1
        if load == fullest and len(part.layers) > 1:
            assert all(other + 1 >= load - 1e-9 for other in loads)


@pytest.mark.parametrize(
    ("parallel", "layers", "micro_batches", "words"),
    [
        (config(2, "1f2b"), 8, 8, r"pipeline_schedule.*1f2b.*1f1b"),
        (config(4), 3, 8, r"num_hidden_layers=3.*at least one layer"),
        (config(2, "zbv"), 3, 8, r"2 x 2 = 4 stages"),
        (config(2, "zbv", pipeline_stages=3), 8, 8, r"exactly 2 stage"),
        (config(2, "dualpipev"), 8, 3, r"at least 4 micro-batches"),
        (config(2, pipeline_stages=2), 8, 8, r"exactly 1 stage"),
        (config(2, "interleaved", pipeline_stages=1), 8, 8, r"at least 2 stage"),
        (config(2, pipeline_split=[4, 3]), 8, 8, r"pipeline_split.*8 in all"),
        (config(2, pipeline_split=[8, 0]), 8, 8, r"pipeline_split"),
        (config(2, pipeline_split=[2, 2, 4]), 8, 8, r"each of 2 stages"),
        (config(4), 8, 3, r"at least 4 micro-batches for 4 stages"),
        (config(2, "interleaved"), 8, 5, r"2 rounds"),
        (config(1, pipeline_split=[8]), 8, 8, r"without a pipeline"),
        (config(1, pipeline_stages=2), 8, 8, r"without a pipeline"),
        (config(2, pipeline_head_layers=-1.0), 8, 8, r"pipeline_head_layers"),
        (config(2, pipeline_embedding_layers=float("nan")), 8, 8, r"pipeline_embedding_layers"),
    ],
)
def test_what_cannot_run_is_refused_by_name(parallel, layers, micro_batches, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        check_pipeline(parallel, layers, micro_batches)


def test_a_pipeline_that_reduces_a_micro_batch_at_a_time_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)accumulate=reduced.*once"):
        resolve(config(2, accumulate="reduced"), 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_can_run_is_let_through(schedule):
    check_pipeline(config(2, schedule), 4, 4)
    check_pipeline(
        replace(config(2, schedule), pipeline_split=[1] * (2 * SCHEDULES[schedule].stages)),
        2 * SCHEDULES[schedule].stages,
        4,
    )
    check_pipeline(config(1, schedule), 1, 1)
