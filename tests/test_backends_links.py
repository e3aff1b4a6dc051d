"""Times of links: between which nodes they are taken, and which node is called slow."""

import collective_tasks
import pytest

from octofold.backends.links import LinkTime, slow_nodes, weak_links


def ring(nodes, slow=(), factor=10.0):
    """Times of a ring of nodes; links in `slow`, pairs, take `factor` times as long."""
    pairs = [tuple(sorted((n, (n + 1) % nodes))) for n in range(nodes)]
    return [LinkTime(pair, "network", "all_reduce", factor if pair in slow else 1.0, 8) for pair in pairs]


@pytest.mark.parametrize("slow", range(5))
def test_the_node_whose_links_are_both_slow_is_named(slow):
    links = [tuple(sorted((slow, other % 5))) for other in (slow - 1, slow + 1)]
    assert slow_nodes(ring(5, links), 4.0) == {slow: 10.0}


def test_one_slow_link_names_both_of_its_nodes():
    assert slow_nodes(ring(5, [(1, 2)]), 4.0) == {1: 10.0, 2: 10.0}


def test_a_node_that_is_slow_inside_is_named():
    times = [LinkTime((node,), "node", "all_to_all", 9.0 if node == 2 else 1.0, 8) for node in range(3)]
    assert slow_nodes(times, 4.0) == {2: 9.0}
    assert slow_nodes(times, 9.5) == {}


def test_of_two_nodes_none_can_be_told():
    assert slow_nodes([LinkTime((0, 1), "network", "all_reduce", 9.0, 8)], 4.0) == {}


def test_links_are_held_against_those_of_their_class():
    """Eight nodes in two supernodes: the network between these is no fault of the nodes at their ends."""
    pairs = [tuple(sorted((n, (n + 1) % 8))) for n in range(8)]
    between = [(3, 4), (0, 7)]
    times = [
        LinkTime(pair, *(("network", "all_reduce", 8.0) if pair in between else ("supernode", "all_reduce", 1.0)), 8)
        for pair in pairs
    ]
    assert slow_nodes(times, 4.0) == {}


def test_links_that_give_less_than_is_asked_of_their_class():
    times = [
        LinkTime((0, 1), "network", "all_reduce", 1.0, 2 * 10**9),
        LinkTime((0,), "node", "all_reduce", 1.0, 10**9),
    ]
    assert weak_links(times, {}) == []
    assert weak_links(times, {"network": 2.0, "node": 1.0}) == []
    assert weak_links(times, {"network": 2.1, "node": 1.0}) == times[:1]
    assert weak_links(times, {"node": 1.5, "supernode": 9.0}) == times[1:]


@pytest.mark.parametrize(
    ("size", "between"),
    [(1, [(0, 1), (2, 3), (0, 3), (1, 2)]), (2, [(0,), (1,), (0, 1)]), (4, [(0,)])],
)
def test_every_node_and_each_with_the_next_are_measured_on_every_rank(size, between, ranks):
    expected = [(nodes, collective) for nodes in between for collective in ("all_reduce", "all_to_all")]
    found = ranks(4).run(collective_tasks.links, size)
    assert [sorted(times) for times in found] == [sorted(expected)] * 4
