"""Degrees of parallelism: what is inferred, and what is refused, by message."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig, resolve

degrees = st.integers(1, 6)


@given(world_size=st.integers(1, 512), expert=st.integers(1, 16), data_shard=st.sampled_from([-1, 1, 2, 4, 8]))
def test_degrees_multiply_to_the_world_or_are_refused(world_size, expert, data_shard):
    config = ParallelConfig(data_shard=data_shard, expert=expert)
    if data_shard not in (-1, world_size):
        with pytest.raises(ConfigError, match=f"parallel.data_shard={data_shard} .*\n.*has {world_size} rank"):
            resolve(config, world_size)
        return
    if world_size % expert:
        with pytest.raises(ConfigError, match=f"parallel.expert={expert} .*parallel.data_shard={world_size} "):
            resolve(config, world_size)
        return
    resolved = resolve(config, world_size)
    assert prod(getattr(resolved, name) for name in DENSE_DEGREES) == world_size
    assert resolved.data == world_size
    assert resolved.expert_data * resolved.expert * resolved.expert_tensor == world_size
    assert resolve(resolved, world_size) == resolved


@given(replicate=degrees, shard=degrees, context=degrees, tensor=degrees, expert=degrees, expert_tensor=degrees)
def test_experts_see_the_ranks_of_a_replica_again(replicate, shard, context, tensor, expert, expert_tensor):
    """The law of the two views, whatever this version builds."""
    config = ParallelConfig(1, replicate, shard, context, tensor, expert, expert_tensor)
    assert config.data == replicate * shard
    if shard * context * tensor % (expert * expert_tensor) == 0:
        assert config.expert_data * expert * expert_tensor == shard * context * tensor


@pytest.mark.parametrize("name", [*DENSE_DEGREES, "expert", "expert_tensor"])
@pytest.mark.parametrize("degree", [0, -2, -1])
def test_degrees_below_one(name, degree):
    if (name, degree) == ("data_shard", -1):
        return
    with pytest.raises(ConfigError) as caught:
        resolve(ParallelConfig(**{name: degree}), 4)
    assert str(caught.value) == (
        f"parallel.{name}={degree}\n  rule:   a degree is at least 1\n  remedy: parallel.{name}=1"
    )


def test_a_product_that_is_not_the_world_shows_all_degrees():
    with pytest.raises(ConfigError) as caught:
        resolve(ParallelConfig(data_shard=3), 4)
    message = str(caught.value)
    assert all(f"parallel.{name}={3 if name == 'data_shard' else 1}" in message for name in DENSE_DEGREES)
    assert "= 3, but the job has 4 rank(s)" in message
    assert "parallel.data_shard=-1" in message


def test_an_expert_degree_that_does_not_divide_shows_the_legal_ones():
    with pytest.raises(ConfigError, match=r"parallel.expert=4 .*parallel.data_shard=6 ") as caught:
        resolve(ParallelConfig(expert=4), 6)
    assert "= 6 rank(s)" in str(caught.value)
    assert caught.value.remedy == "parallel.expert one of [1, 2, 3, 6], or start more ranks"
