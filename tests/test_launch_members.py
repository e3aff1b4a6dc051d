"""Which nodes of those that have met run ranks."""

from dataclasses import replace

import pytest

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import compose
from octofold.launch.config import check
from octofold.launch.job import settle
from octofold.launch.members import (
    fit_nodes,
    fitted,
    least_nodes,
    nodes_of,
    refitted,
    require_alike,
    require_no_table,
    standing_by,
)

JOB = ["launch=torchrun", "launch.nproc_per_node=2", "train.micro_batch_size=1", "train.global_batch_size=24"]


def job(nodes: int, least: int | None = None, *more: str):
    found = compose([*JOB, f"launch.nodes={nodes}", *more])
    return replace(found, launch=replace(found.launch, min_nodes=least))


def facts(name: str, *complaints: str, node_rank: int | None = None) -> dict:
    return {"name": name, "node_rank": node_rank, "torch": "2.13", "complaints": list(complaints)}


@pytest.mark.parametrize(
    ("nodes", "least", "present", "expected"),
    [
        (4, 1, 4, 4),  # 24 sequences among 8 ranks
        (6, 1, 5, 4),  # 10 ranks do not divide them
        (6, 5, 6, 6),
        (6, 1, 1, 1),
        (6, 6, 6, 6),
    ],
)
def test_as_many_nodes_as_the_batch_can_be_divided_among(nodes, least, present, expected):
    found = fitted(job(nodes, least), present)
    assert nodes_of(found) == expected
    assert found.parallel.data_shard == 2 * expected
    assert found.launch.nodes == nodes


def test_where_no_number_of_nodes_will_do_it_says_why_all_will_not():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size") as caught:
        fitted(job(5, 5), 5)
    assert "10" in str(caught.value)
    with pytest.raises(ConfigError, match="parallel"):
        fitted(job(4, 3, "parallel.data_shard=8"), 3)


def test_a_job_that_has_begun_moves_to_fewer_nodes():
    drafted = job(4, 1)
    begun = fitted(drafted, 4)
    fewer = refitted(begun, drafted, 3)
    assert (nodes_of(begun), nodes_of(fewer)) == (4, 3)
    assert replace(fewer, parallel=begun.parallel) == begun, "nothing else changes"


def test_a_job_with_spare_nodes_is_proved():
    texts = [*JOB, "launch.nodes=5"]
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        settle(texts)
    assert nodes_of(settle([*texts, "launch.min_nodes=4"]).config) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["launch.min_nodes=0"], "from 1 to launch.nodes=2"),
        (["launch.min_nodes=3"], "from 1 to launch.nodes=2"),
        (["launch.min_nodes=1", "launch.rendezvous.backend=static"], "every node keeps its number"),
        (["launch.min_nodes=1", "launch.rendezvous.timeout_s=60"], "the last call is part of the time"),
    ],
)
def test_what_min_nodes_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        check(compose([*JOB, "launch.nodes=2", *more]).launch)


def test_unfit_nodes_are_left_out_or_end_the_job():
    nodes = [facts("a"), facts("b", "disk: full", "shm: small"), facts("c")]
    assert fit_nodes(nodes, job(3, 2).launch) == [0, 2]
    assert standing_by(nodes, [0]) == {1: "disk: full; shm: small", 2: "the layout uses 1 of the nodes that are fit"}
    with pytest.raises(UserError, match="b: disk: full\n  b: shm: small"):
        fit_nodes(nodes, job(3).launch)
    assert least_nodes(job(3).launch) == 3


def test_ranks_are_dealt_out_by_the_numbers_that_nodes_were_given():
    nodes = [facts("a", node_rank=2), facts("b"), facts("c", node_rank=0), facts("d", "disk: full", node_rank=1)]
    assert fit_nodes(nodes, job(4, 1).launch) == [2, 0, 1]
    assert fit_nodes([facts("a"), facts("b")], job(2).launch) == [0, 1]


def test_a_rank_table_and_missing_nodes_exclude_each_other():
    require_no_table({"RANK_TABLE_FILE": "table.json"}, job(2).launch)
    require_no_table({}, job(2, 1).launch)
    with pytest.raises(ConfigError, match=r"min_nodes=1 RANK_TABLE_FILE=table\.json"):
        require_no_table({"RANK_TABLE_FILE": "table.json"}, job(2, 1).launch)


def test_nodes_may_differ_in_name_alone():
    require_alike([facts("a"), facts("other", node_rank=1)])
    with pytest.raises(UserError, match=r"nodes differ in torch: a 2\.13, b 2\.12"):
        require_alike([facts("a"), facts("b") | {"torch": "2.12"}])
