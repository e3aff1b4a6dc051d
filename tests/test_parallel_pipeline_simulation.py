"""Simulated schedules against the closed forms of their papers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline_simulation import StageCost, action_table, simulate_schedule, stage_costs
from octofold.parallel.pipeline_split import SCHEDULES, stages_a_rank


def config(schedule: str, ranks: int, stages: int = 0) -> ParallelConfig:
    return ParallelConfig(pipeline=ranks, data_shard=1, pipeline_schedule=schedule, pipeline_stages=stages)


def even(parallel: ParallelConfig) -> list[StageCost]:
    """A rank's stages take 1 s together for each of forward, and both parts of backward."""
    held = stages_a_rank(parallel)
    return [StageCost(1 / held, 1 / held, 1 / held, activation_bytes=1 / held)] * (parallel.pipeline * held)


@given(schedule=st.sampled_from(["gpipe", "1f1b"]), ranks=st.integers(2, 8), more=st.integers(0, 9))
def test_gpipe_and_1f1b_wait_as_long_as_the_others_fill_and_drain(schedule, ranks, more):
    """(p - 1) / (m + p - 1) (arXiv 1811.06965, section 2.3; 2104.04473, section 2.2)."""
    parallel, micro_batches = config(schedule, ranks), ranks + more
    found = simulate_schedule(parallel, micro_batches, even(parallel))
    assert found.bubble_share == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    assert found.step_s == pytest.approx(3 * (micro_batches + ranks - 1))
    held = [micro_batches] * ranks if schedule == "gpipe" else [ranks - rank for rank in range(ranks)]
    assert found.peak_activations == held
    assert found.peak_bytes == pytest.approx(held)


@given(ranks=st.integers(2, 6), stages=st.integers(2, 4), rounds=st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(ranks, stages, rounds):
    """(p - 1) / (v m + p - 1) (arXiv 2104.04473, section 2.2)."""
    parallel, micro_batches = config("interleaved", ranks, stages), ranks * rounds
    found = simulate_schedule(parallel, micro_batches, even(parallel))
    assert found.bubble_share == pytest.approx((ranks - 1) / (stages * micro_batches + ranks - 1))


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_split_backward_fills_most_of_the_bubble(schedule, ranks):
    """ZB-V at equal times waits for the first micro-batch to come through half the stages, p - 1 of them, only."""
    parallel, micro_batches = config(schedule, ranks), 4 * ranks
    found = simulate_schedule(parallel, micro_batches, even(parallel))
    assert found.step_s == pytest.approx(3 * micro_batches + (ranks - 1) / 2)
    # As much as the fullest rank of 1F1B, whose stages are twice as large, but the same on every rank.
    assert max(found.peak_bytes) <= ranks + 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_micro_batch_passes_every_stage_once(schedule):
    parallel, micro_batches = config(schedule, 2), 6
    table = action_table(parallel, micro_batches)
    kinds: dict[str, list[tuple[int, int]]] = {}
    for actions in table.values():
        for action in actions:
            kinds.setdefault(action.kind, []).append((action.stage, action.micro_batch))
    everything = sorted(
        (stage, number) for stage in range(2 * stages_a_rank(parallel)) for number in range(micro_batches)
    )
    assert sorted(kinds["F"]) == everything
    assert sorted(kinds.get("B", []) + kinds.get("I", [])) == everything
    assert sorted(kinds.get("W", [])) == sorted(kinds.get("I", []))


@given(schedule=st.sampled_from(list(SCHEDULES)), ranks=st.integers(2, 4), send=st.floats(0.01, 2.0))
def test_what_takes_time_to_travel_delays_and_work_stays_the_same(schedule, ranks, send):
    parallel = config(schedule, ranks)
    micro_batches = 2 * ranks
    quick = even(parallel)
    slow = [StageCost(cost.forward_s, cost.backward_input_s, cost.backward_weight_s, send_s=send) for cost in quick]
    before, after = (simulate_schedule(parallel, micro_batches, costs) for costs in (quick, slow))
    assert after.step_s > before.step_s
    assert after.busy_s == pytest.approx(before.busy_s)


def test_the_slowest_stage_sets_the_pace():
    parallel = config("1f1b", 2)
    found = simulate_schedule(parallel, 10, [StageCost(1, 1, 1), StageCost(2, 2, 2)])
    # The second rank is never idle but for the first forward pass before and the first rank's last backward after it.
    assert found.step_s == pytest.approx(10 * 6 + 1 + 2)


def test_costs_of_stages_count_what_stands_at_the_ends():
    parallel = ParallelConfig(pipeline=2, data_shard=1, pipeline_embedding_layers=0.5, pipeline_head_layers=2.0)
    costs = stage_costs(parallel, 8, 1, StageCost(1.0, 2.0, 3.0, send_s=0.1, activation_bytes=10.0))
    # 6.5 layers with the embedding; 2 with two heads and a depth, which is a layer.
    assert costs == [StageCost(6.5, 13.0, 19.5, 0.1, 65.0), StageCost(7.0, 14.0, 21.0, 0.1, 70.0)]
