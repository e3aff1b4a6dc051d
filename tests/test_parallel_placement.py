"""Where experts stand: how they are packed, and that a move brings every row where it belongs."""

import placement_tasks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octofold.parallel.placement import imbalance, improved, packed, rank_loads, settled


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[float], dict[str, int]]:
    """Loads, and the ranks, nodes and groups that share them."""
    nodes, ranks_a_node, held = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = nodes * ranks_a_node * held
    groups = draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
    loads = draw(st.lists(st.integers(0, 50).map(float), min_size=experts, max_size=experts))
    return loads, {"ranks": nodes * ranks_a_node, "nodes": nodes, "groups": groups}


@given(packings(), st.randoms(use_true_random=False))
def test_an_order_is_a_permutation_and_never_worse(packing, shuffle):
    loads, where = packing
    present = list(range(len(loads)))
    shuffle.shuffle(present)
    order = improved(loads, present, **where)
    assert sorted(order) == list(range(len(loads)))
    assert max(rank_loads(loads, order, where["ranks"])) <= max(rank_loads(loads, present, where["ranks"]))
    assert improved(loads, order, **where) == order, "what is packed already stays"
    assert imbalance(loads, order, where["ranks"]) >= 1 - 1e-12 or not any(loads)


@given(packings())
def test_groups_stay_on_one_node_where_nodes_divide_them(packing):
    loads, where = packing
    if where["groups"] % where["nodes"]:
        return
    experts, present = len(loads), list(range(len(loads)))
    order = improved(loads, present, **where)
    size = experts // where["groups"]
    node_of = {expert: slot * where["nodes"] // experts for slot, expert in enumerate(order)}
    for group in range(where["groups"]):
        assert len({node_of[e] for e in range(group * size, (group + 1) * size)}) == 1


def test_the_heaviest_go_first_to_the_lightest_with_room():
    assert packed([8, 7, 6, 5, 1, 0], 3) == [[0, 5], [1, 4], [2, 3]]
    assert packed([9, 1, 1, 1], 2) == [[0, 3], [1, 2]], "a full pack takes no more, and ties go to the lower number"


def test_packs_settle_where_most_of_them_is():
    assert settled([[0, 1], [2, 3], [4, 5]], [[4, 5], [2, 0], [3, 1]]) == [[4, 5], [0, 1], [2, 3]]


def test_a_skewed_load_is_evened_out():
    """The four busiest experts of sixteen stand side by side, on one rank of four."""
    loads = [100.0] * 4 + [10.0] * 12
    present = list(range(16))
    assert imbalance(loads, present, 4) == pytest.approx(400 / 130)
    assert imbalance(loads, improved(loads, present, ranks=4, nodes=1, groups=1), 4) == pytest.approx(1.0)
    # Two groups a node: each node keeps its own, and the busy ones share a node.
    held = improved(loads, present, ranks=4, nodes=2, groups=4)
    assert imbalance(loads, held, 4) == pytest.approx(220 / 130)


@pytest.mark.parametrize(("n", "expert", "experts"), [(2, 2, 8), (4, 2, 8), (4, 4, 8), (4, 2, 6), (4, 2, 2)])
def test_rows_arrive_whatever_the_shards(ranks, n, expert, experts):
    """Stacks that are split evenly, unevenly, or along another dim by FSDP."""
    generator = torch.Generator().manual_seed(n * 100 + experts)
    sources = torch.randperm(experts, generator=generator).tolist()
    for found in ranks(n).run(placement_tasks.moved_rows, expert, experts, sources):
        for name, (before, after) in found.items():
            assert torch.equal(after, before[sources]), name
