"""Nodes, supernodes and links, against counting; layouts that a launcher or a user got wrong."""

import collective_tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_configs import tiny_run, write_corpus

from octofold.backends.config import BackendConfig, check
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo
from octofold.backends.topology import LINKS, Topology


def test_links_by_distance():
    topology = Topology(ranks_per_node=2, ranks_per_supernode=4)
    assert [topology.link(1, other) for other in range(6)] == [
        "node",
        "local",
        "supernode",
        "supernode",
        "network",
        "network",
    ]
    assert Topology(2, 2).link(1, 2) == "network", "without supernodes the network lies between nodes"


@given(st.integers(1, 8), st.integers(1, 4), st.lists(st.integers(0, 63), unique=True, min_size=1))
def test_links_agree_with_nodes(per_node, nodes, ranks):
    topology = Topology(per_node, per_node * nodes)
    by_node = topology.by_node(ranks)
    assert sorted(rank for of_node in by_node.values() for rank in of_node) == sorted(ranks)
    for a in ranks:
        assert a in by_node[a // per_node]
        for b in ranks:
            assert topology.link(a, b) == topology.link(b, a)
            near = LINKS.index(topology.link(a, b))
            assert (near <= 0) == (a == b)
            assert (near <= 1) == (a // per_node == b // per_node)
            assert (near <= 2) == (a // (per_node * nodes) == b // (per_node * nodes))


def test_by_node_keeps_the_groups_order():
    assert Topology(4, 4).by_node([9, 1, 8, 3]) == {2: [9, 8], 0: [1, 3]}


def test_the_configuration_goes_before_the_environment():
    info = RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert Topology.read(BackendConfig(), info) == Topology(4, 4)
    assert Topology.read(BackendConfig(ranks_per_node=2), info) == Topology(2, 2)
    assert Topology.read(BackendConfig(ranks_per_node=2, ranks_per_supernode=4), info) == Topology(2, 4)


@pytest.mark.parametrize(
    ("info", "rule"),
    [
        (RankInfo(6, 7, 2, 4), "WORLD_SIZE=7 LOCAL_WORLD_SIZE=4\n  rule:   every node has the same number"),
        (RankInfo(1, 8, 0, 4), "RANK=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=4\n  rule:   ranks are numbered node by node"),
    ],
)
def test_nodes_that_the_environment_got_wrong(info, rule):
    with pytest.raises(ConfigError) as caught:
        Topology.read(BackendConfig(), info)
    assert str(caught.value).startswith(rule)
    assert "backend.ranks_per_node" in caught.value.remedy
    Topology.read(BackendConfig(ranks_per_node=1), info)


@pytest.mark.parametrize(
    ("per_node", "per_supernode", "world_size", "rule"),
    [
        (3, 0, 8, "fill whole units"),
        (2, 6, 8, "fill whole units"),
        (4, 6, 12, "made of whole nodes"),
        (0, 4, 8, "made of whole nodes"),
    ],
)
def test_sizes_that_do_not_fit(per_node, per_supernode, world_size, rule):
    with pytest.raises(ConfigError, match=rule):
        check(BackendConfig(ranks_per_node=per_node, ranks_per_supernode=per_supernode), world_size)


@pytest.mark.parametrize(
    ("per_node", "per_supernode", "world_size"), [(0, 0, 7), (4, 0, 8), (8, 0, 4), (4, 8, 16), (16, 384, 64)]
)
def test_sizes_that_fit(per_node, per_supernode, world_size):
    check(BackendConfig(ranks_per_node=per_node, ranks_per_supernode=per_supernode), world_size)


@pytest.mark.parametrize(("per_node", "route"), [(0, "FlatExperts"), (1, "TwoStageExperts")])
def test_experts_on_several_nodes_are_reached_in_two_stages(per_node, route, ranks, tmp_path):
    groups = {"model": {"vocab_size": 64}, "parallel": {"expert": 2}, "backend": {"ranks_per_node": per_node}}
    config = tiny_run(write_corpus(tmp_path), 2, **groups)
    assert ranks(2).run(collective_tasks.routes_of, config) == [{route}] * 2
