"""Meshes: two views of the same ranks, experts innermost."""

import pytest
import rank_tasks


@pytest.mark.parametrize(
    ("expert", "experts", "group_of_1", "expert_data_of_1"),
    [
        (1, [[0], [1], [2], [3]], [1], [0, 1, 2, 3]),
        (2, [[0, 1], [2, 3]], [0, 1], [1, 3]),
        (4, [[0, 1, 2, 3]], [0, 1, 2, 3], [1]),
    ],
)
def test_experts_are_innermost(ranks, expert, experts, group_of_1, expert_data_of_1):
    views = ranks(4).run(rank_tasks.mesh_ranks, expert)
    assert [view["dense"] for view in views] == [[0, 1, 2, 3]] * 4
    assert [view["experts"] for view in views] == [experts] * 4
    assert views[1]["expert_group"] == group_of_1
    assert views[1]["expert_data"] == expert_data_of_1
