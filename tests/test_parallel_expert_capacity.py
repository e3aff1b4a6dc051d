"""A fixed number of places for each rank's tokens: what finds none is dropped, the lightest first, and counted."""

import math
from dataclasses import replace
from typing import Any

import expert_tasks
import numpy as np
import pytest
import torch
from expert_tasks import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from run_configs import tiny_run, write_corpus
from test_parallel_expert import CASES, EXACT, EXPERTS, assert_as_local, case_of

from octofold.parallel.local_ranks import LocalRanks
from octofold.train.layout.record import record


def kept_TK(case: Case, rank: int, factor: float) -> torch.Tensor:
    """By sorting: which copies find a place; of equal weights the earlier copy."""
    experts, weights = case.experts[rank].flatten().tolist(), case.gate[rank].flatten().tolist()
    places = math.ceil(factor * len(experts) / EXPERTS)
    kept = torch.zeros(len(experts), dtype=torch.bool)
    for expert in range(EXPERTS):
        own = [copy for copy, chosen in enumerate(experts) if chosen == expert]
        kept[sorted(own, key=lambda copy: (-weights[copy], copy))[:places]] = True
    return kept.view_as(case.experts[rank])


def assert_drops_the_lightest(started: LocalRanks, case: Case, factor: float, sliced: int = 1) -> None:
    """Results, and gradients of tokens, of the gate's weights and of experts, are those of what is kept."""
    options: dict[str, Any] = {"name": "capacity", "factor": factor, "sliced": sliced}
    found = started.run(expert_tasks.split, case, options)
    kept = [kept_TK(case, rank, factor) for rank in range(started.ranks)]
    lighter = replace(case, gate=[gate * keep for gate, keep in zip(case.gate, kept, strict=True)])
    expected = [expert_tasks.whole(lighter, rank) for rank in range(started.ranks)]
    for a, b, keep in zip(found, expected, kept, strict=True):
        assert a["traffic"]["dropped_tokens"] == (~keep).sum()
        torch.testing.assert_close(a["y"], b["y"], **EXACT)
        torch.testing.assert_close(a["x"], b["x"], **EXACT)
        torch.testing.assert_close(a["gate"], b["gate"] * keep, **EXACT)
    for name in case.weights:
        summed = torch.stack([gradients[name] for gradients in expected]).sum(0)
        firsts = range(0, started.ranks, sliced)
        parts = [torch.cat([f[name] for f in found[first : first + sliced]], dim=2) for first in firsts]
        torch.testing.assert_close(torch.cat(parts), summed, **EXACT)


def crowded(n: int) -> Case:
    """Four tokens on each rank; expert 0 is chosen by all of them."""
    return case_of([[[0, 1], [0, 2 + rank], [0, 7], [0, 3]] for rank in range(n)])


@pytest.mark.parametrize("sliced", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_what_finds_no_place_is_dropped_and_counted(ranks, factor, sliced):
    """A factor of 2 gives expert 0 two places for its four tokens, one of 4 a place for each."""
    dropped = {0.5: 4, 2.0: 2, 4.0: 0}[factor]
    assert all(int((~kept_TK(crowded(2), rank, factor)).sum()) in (dropped, dropped - 1) for rank in range(2))
    assert_drops_the_lightest(ranks(2), crowded(2), factor, sliced)


def test_equal_weights_keep_the_earlier_tokens(ranks):
    case = crowded(2)
    assert_drops_the_lightest(ranks(2), replace(case, gate=[torch.full_like(gate, 0.5) for gate in case.gate]), 1.0)


@st.composite
def even_routings(draw: st.DrawFn, n: int) -> list[list[list[int]]]:
    """As many tokens on each rank, each with as many experts, all different."""
    tokens, slots = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    row = st.permutations(range(EXPERTS)).map(lambda order: list(order[:slots]))
    return draw(st.lists(st.lists(row, min_size=tokens, max_size=tokens), min_size=n, max_size=n))


@pytest.mark.parametrize("n", [2, 4])
@settings(max_examples=15)
@given(data=st.data())
def test_any_routing(ranks, n, data):
    case = case_of(data.draw(even_routings(n)))
    assert_drops_the_lightest(ranks(n), case, data.draw(st.floats(0.05, EXPERTS)))
    # As many places as there are copies: the flat route.
    found = assert_as_local(ranks(n), case, {"name": "capacity", "factor": float(EXPERTS)})
    assert [f["traffic"]["dropped_tokens"] for f in found] == [0] * n


@pytest.mark.parametrize("case", ["even", "one token a rank"])
def test_enough_places_are_the_flat_route(ranks, case):
    options: list[dict[str, Any]] = [{"name": "flat"}, {"name": "capacity", "factor": float(EXPERTS)}]
    flat, places = (ranks(4).run(expert_tasks.split, case_of(CASES[case][:4]), chosen) for chosen in options)
    for a, b in zip(places, flat, strict=True):
        for name in ("y", "x", "gate", "gate_up_proj", "down_proj"):
            torch.testing.assert_close(a[name], b[name], **EXACT)


def test_nothing_is_dropped_where_no_gradient_is_asked_for(ranks):
    options: dict[str, Any] = {"name": "capacity", "factor": 0.1}
    for a, b in zip(
        ranks(2).run(expert_tasks.without_gradient, crowded(2), options),
        ranks(2).run(expert_tasks.without_gradient, crowded(2), {"name": "flat"}),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [0.5, 8.0])
def test_the_metrics_tell_what_was_dropped(ranks, tmp_path, factor):
    """Over all ranks and layers: on each rank what an expert was chosen for beyond its places."""
    root = write_corpus(tmp_path, documents=20)
    config = tiny_run(root, 2, parallel={"expert": 2, "expert_capacity": factor}, train={"steps": 2})
    facts = ranks(2).run(record, config, tmp_path / "run")
    copies = config.train.micro_batch_size * config.data.sequence_length * config.model.num_experts_per_tok
    places = math.ceil(factor * copies / config.model.n_routed_experts)
    for step in range(2):
        loads = [load for of_rank in facts for load in of_rank.steps[step].loads.values()]
        assert all(load.sum() == copies for load in loads)
        expected = sum(int(np.clip(load - places, 0, None).sum()) for load in loads)
        assert {of_rank.steps[step].report["dropped_tokens"] for of_rank in facts} == {expected}
        assert (expected > 0) == (factor < 1)
