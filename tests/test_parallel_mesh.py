"""Meshes: several views of the same ranks, pipeline outermost."""

from itertools import product
from math import prod

import pytest
import rank_tasks

from octofold.backends.config import BackendConfig
from octofold.parallel.config import ParallelConfig
from octofold.parallel.local_ranks import LocalRanks

AXES = {
    "dense": ("pipeline", "data_replicate", "data_shard", "context", "tensor"),
    "experts": ("pipeline", "data_replicate", "expert_data", "expert", "expert_tensor"),
    "split": ("pipeline", "data_replicate", "shard", "tensor"),
    "whole": ("pipeline", "data_replicate", "shard"),
    "shared": ("pipeline", "data_replicate", "data_shard", "sequence"),
}
LAYOUTS = [
    ParallelConfig(data_shard=8),
    ParallelConfig(data_shard=4, tensor=2, expert=4),
    ParallelConfig(data_replicate=2, data_shard=2, context=2, expert=2, expert_tensor=2),
    ParallelConfig(data_replicate=2, data_shard=1, context=2, tensor=2, expert=4),
]


def sizes_of(config: ParallelConfig) -> dict[str, int]:
    inner = {"shard": config.data_shard * config.context, "sequence": config.context * config.tensor}
    named = ("pipeline", "data_replicate", "data_shard", "context", "tensor", "expert_data", "expert", "expert_tensor")
    return {**{name: getattr(config, name) for name in named}, **inner}


def neighbours(config: ParallelConfig, view: str, axis: str, rank: int) -> list[int]:
    """By counting: the ranks whose coordinates differ on this axis alone, when the last axis counts fastest."""
    sizes = sizes_of(config)
    if view == "whole":
        sizes["shard"] *= config.tensor
    places = list(product(*(range(sizes[name]) for name in AXES[view])))
    assert len(places) == 8
    here, number = places[rank], AXES[view].index(axis)
    others = here[:number] + here[number + 1 :]
    return [r for r, place in enumerate(places) if place[:number] + place[number + 1 :] == others]


@pytest.mark.parametrize("config", LAYOUTS, ids=lambda c: f"{c.data_replicate}x{c.data_shard}x{c.context}x{c.tensor}")
def test_every_axis_of_every_view(ranks, config):
    for rank, found in enumerate(ranks(8).run(rank_tasks.mesh_ranks, config)):
        expected = {
            f"{view}.{axis}": neighbours(config, view, axis, rank) for view, axes in AXES.items() for axis in axes
        }
        assert found["groups"] == expected
        inner = config.context * config.tensor
        assert found["data_rank"] == rank // inner
        assert found["speaks"] == (rank % config.tensor == 0)


def test_a_meshs_groups_wait_as_long_as_the_backend_is_told():
    with LocalRanks(2, ("rank_tasks",), BackendConfig(name="cpu", threads=1, timeout_s=2.0)) as two:
        (message, waited_s), _ = two.run(rank_tasks.wait_in_a_mesh, ParallelConfig(data_shard=2), 8.0)
    assert "Timed out waiting 2000ms" in message
    assert 1.5 < waited_s < 8.0


def test_ranks_that_share_sequences_read_the_same_ones(ranks):
    found = ranks(8).run(rank_tasks.mesh_ranks, ParallelConfig(data_shard=2, context=2, tensor=2))
    assert [view["data_rank"] for view in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sum(view["speaks"] for view in found) == prod((2, 2))
