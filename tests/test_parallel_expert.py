"""Experts on other ranks compute what local ones do, in FP64, by every route: results and gradients of tokens, of the
gate's weights and of the experts' weights.
"""

from dataclasses import replace
from typing import Any

import expert_tasks
import pytest
import torch
from expert_tasks import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALL

from octofold.kernels.qtensor import Format
from octofold.parallel.local_ranks import LocalRanks
from octofold.parallel.transport import Transport

EXPERTS = 8
WIDTH, INNER = 5, 6
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
"""FP64; a weight's gradient is summed in another order."""
NODES: dict[int, list[tuple[int, ...]]] = {
    2: [(0, 0), (0, 1)],
    4: [(0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 0, 5)],
    8: [(0,) * 8, (0,) * 4 + (1,) * 4, (0, 0, 1, 1, 2, 2, 3, 3), tuple(range(8)), (0, 0, 0, 1, 1, 1, 2, 2)],
}
"""By number of ranks: the node of each; also nodes of different sizes."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case_of(
    experts: list[list[list[int]]], dtype: torch.dtype = torch.float64, width: int = WIDTH, std: float = 1.0
) -> Case:
    """`experts[rank]`: for each token, the experts chosen, as many for all. `std`: of the experts' weights."""
    slots = max((len(row) for rows in experts for row in rows), default=1)
    model = replace(
        SMALL,
        hidden_size=width,
        moe_intermediate_size=INNER,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=slots,
    )
    weights = {
        "gate_up_proj": normal(EXPERTS, 2, INNER, width, seed=100).mul(std).to(dtype),
        "down_proj": normal(EXPERTS, width, INNER, seed=101).mul(std).to(dtype),
    }
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        model,
        weights,
        [normal(len(rows), width, seed=rank).to(dtype) for rank, rows in enumerate(experts)],
        [torch.tensor(rows, dtype=torch.int64).view(len(rows), slots) for rows in experts],
        [normal(len(rows), slots, seed=50 + rank).to(exact) for rank, rows in enumerate(experts)],
    )


def assert_as_local(
    started: LocalRanks, case: Case, options: dict[str, Any], gate: dict[str, float] = EXACT
) -> list[dict[str, Any]]:
    """Hold a route on every rank to one rank that holds all experts; `gate`: tolerance of the gradient of weights."""
    n = started.ranks
    found: list[dict[str, Any]] = started.run(expert_tasks.split, case, options)
    expected = [expert_tasks.whole(case, rank) for rank in range(started.ranks)]
    for rank, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in ("y", "x", "gate"):
            allowed = gate if name == "gate" else EXACT
            torch.testing.assert_close(a[name], b[name], **allowed, msg=lambda text, r=rank, n=name: f"{r} {n}: {text}")
    sliced = options.get("sliced", 1)
    for name in case.weights:
        summed = torch.stack([gradients[name] for gradients in expected]).sum(0)
        parts = [torch.cat([f[name] for f in found[first : first + sliced]], dim=2) for first in range(0, n, sliced)]
        torch.testing.assert_close(torch.cat(parts), summed, **EXACT)
    return found


CASES = {
    "even": [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 8,
    "uneven": [[[0, 5], [7, 6]], [[1, 2]], [[3, 7]] * 5, [[7, 0]], [], [[4, 1]] * 2, [[2, 6]], [[0, 7]] * 3],
    "one expert takes all": [[[2]] * n for n in (3, 1, 1, 2, 5, 1, 1, 1)],
    "one token a rank": [[[(3 * r) % 8, (3 * r + 4) % 8, (3 * r + 1) % 8]] for r in range(8)],
    "a rank without tokens": [[], [[3, 0], [1, 2]], [], [[6, 1]], [], [], [[5, 4]], []],
    "no tokens at all": [[]] * 8,
    "every expert": [[list(range(8))] * 2, [list(range(7, -1, -1))]] * 4,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_flat(ranks, n, case):
    assert_as_local(ranks(n), case_of(CASES[case][:n]), {"name": "flat"})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "nodes"), [(n, nodes) for n in (2, 4) for nodes in NODES[n]], ids=str)
def test_two_stage(ranks, n, nodes, case):
    assert_as_local(ranks(n), case_of(CASES[case][:n]), {"name": "two_stage", "nodes": nodes})


@pytest.mark.parametrize("nodes", NODES[8], ids=str)
def test_two_stage_on_eight_ranks(ranks, nodes):
    for case in ("uneven", "every expert"):
        assert_as_local(ranks(8), case_of(CASES[case]), {"name": "two_stage", "nodes": nodes})


def routings(n: int) -> st.SearchStrategy[list[list[list[int]]]]:
    """Any number of tokens on each of n ranks, each with as many experts, all different."""

    def of_slots(slots: int) -> st.SearchStrategy[list[list[list[int]]]]:
        row = st.permutations(range(EXPERTS)).map(lambda order: list(order[:slots]))
        return st.lists(st.lists(row, max_size=6), min_size=n, max_size=n)

    return st.integers(1, 4).flatmap(of_slots)


@pytest.mark.parametrize("n", [2, 4])
@settings(max_examples=15)
@given(data=st.data())
def test_any_routing(ranks, n, data):
    options = data.draw(
        st.sampled_from([{"name": "flat"}, *({"name": "two_stage", "nodes": nodes} for nodes in NODES[n])])
    )
    assert_as_local(ranks(n), case_of(data.draw(routings(n))), options)


def crossings(case: Case, nodes: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Copies of this rank's tokens for experts of other nodes, and tokens times such nodes."""
    held = EXPERTS // len(nodes)
    places = [{nodes[expert // held] for expert in row} - {nodes[rank]} for row in case.experts[rank].tolist()]
    copies = sum(nodes[expert // held] != nodes[rank] for row in case.experts[rank].tolist() for expert in row)
    return copies, sum(len(of_token) for of_token in places)


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 1, 1)], ids=str)
def test_a_token_crosses_between_nodes_once_for_each(ranks, nodes):
    """There and back, and so do gradients; the flat route sends every copy."""
    case = case_of([[[0, 1, 2, 7], [4, 5, 6, 7]], [[0, 2, 4, 6]], [[0, 1, 2, 3]] * 3, [[7, 6, 5, 4]]])
    slots = 4
    choice_bytes = {"dispatch": slots * (8 + 4), "dispatch_gradient": slots * 8}
    flat = assert_as_local(ranks(4), case, {"name": "flat", "nodes": nodes})
    staged = assert_as_local(ranks(4), case, {"name": "two_stage", "nodes": nodes})
    counted = [crossings(case, nodes, rank) for rank in range(4)]
    for purpose in ("dispatch", "combine", "dispatch_gradient", "combine_gradient"):
        # What leaves a rank comes home to it, so the sums over ranks are alike.
        copies, tokens = sum(c for c, _ in counted), sum(t for _, t in counted)
        assert sum(f["traffic"][f"network_{purpose}"] for f in flat) == copies * WIDTH * 8
        assert sum(f["traffic"][f"network_{purpose}"] for f in staged) == tokens * (
            WIDTH * 8 + choice_bytes.get(purpose, 0)
        )
    assert any(f["traffic"]["dispatch"] > f["traffic"]["network_dispatch"] for f in staged)


def test_rows_travel_in_fp8_and_are_rounded_once(ranks):
    """Two stages carry the bytes of one, and err as little: E4M3 rounds a number by 1/16 of itself at most."""
    transport, nodes = Transport(Format((1, 16)), Format((1, 16))), (0, 0, 1, 1)
    case = case_of(CASES["every expert"][:4], torch.bfloat16, width=32, std=0.1)
    exact = replace(
        case,
        weights={name: weight.double() for name, weight in case.weights.items()},
        x=[x.double() for x in case.x],
        gate=[gate.double() for gate in case.gate],
    )
    truth = [expert_tasks.whole(exact, rank) for rank in range(4)]
    flat = ranks(4).run(expert_tasks.split, case, {"name": "flat", "transport": transport})
    staged = ranks(4).run(expert_tasks.split, case, {"name": "two_stage", "nodes": nodes, "transport": transport})
    plain = ranks(4).run(expert_tasks.split, case, {"name": "two_stage", "nodes": nodes})
    for name in ("y", "x", "gate"):
        true = torch.cat([t[name].flatten() for t in truth])
        for route in (flat, staged):
            found = torch.cat([f[name].flatten() for f in route]).double()
            assert (found - true).norm() < true.norm() / 16, name
    for b, c in zip(staged, plain, strict=True):
        assert not torch.equal(b["y"], c["y"]), "FP8 shows"
        assert b["traffic"]["network_dispatch"] * (32 * 2 + 8 * 8) == c["traffic"]["network_dispatch"] * (
            32 + 2 + 8 * 8
        )
        assert b["traffic"]["network_combine_gradient"] * 64 == c["traffic"]["network_combine_gradient"] * (32 + 2)


@pytest.mark.parametrize("options", [{"name": "flat"}, {"name": "two_stage", "nodes": (0, 1)}], ids=str)
def test_overlap_changes_no_bit(ranks, options):
    case = case_of(CASES["uneven"][:2])
    on, off = (ranks(2).run(expert_tasks.split, case, {**options, "overlap": overlap}) for overlap in (True, False))
    for a, b in zip(on, off, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("y", "x", "gate", *case.weights))


# --- slices of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{"name": "flat"}, {"name": "two_stage", "nodes": (0, 1)}], ids=str)
def test_experts_in_slices(ranks, options, case):
    """Two ranks hold slices of each expert; ranks 0 and 2 exchange, and 1 and 3."""
    assert_as_local(ranks(4), case_of(CASES[case][:4]), {**options, "sliced": 2})


@pytest.mark.parametrize("sliced", [2, 3])
def test_every_rank_holds_slices_of_all_experts(ranks, sliced):
    assert_as_local(ranks(sliced), case_of(CASES["uneven"][:sliced]), {"name": "flat", "sliced": sliced})
