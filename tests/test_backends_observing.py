"""Collectives are seen whoever issues them: FSDP2, DTensor, pipelining, functional collectives, and our own."""

from collections import Counter

import collective_tasks


def test_fsdp_forward_and_backward(ranks):
    for seen in ranks(2).run(collective_tasks.fsdp_step):
        found = Counter(seen.calls)
        assert found.keys() == {("world", "all_gather"), ("world", "reduce_scatter")}
        assert found["world", "all_gather"] >= 2
        assert found["world", "reduce_scatter"] == 2
        assert len(seen.durations_s) == len(seen.calls)


def test_dtensor_and_functional_collectives(ranks):
    for seen in ranks(2).run(collective_tasks.redistribution):
        assert [op for _, op in seen.calls] == ["all_gather", "all_reduce"]
        assert len(seen.durations_s) == 2


def test_messages_of_a_pipeline(ranks):
    first, last = ranks(2).run(collective_tasks.pipeline_step)
    # Two micro-batches, their gradients, and what the stages tell each other beforehand.
    assert Counter(first.calls) == Counter(last.calls)
    assert Counter(first.calls).keys() == {("pipeline", "send"), ("pipeline", "receive")}
    assert first.calls.count(("pipeline", "send")) >= 2
    assert len(first.durations_s) == len(last.durations_s) == len(first.calls)


def test_single_messages(ranks):
    first, last = ranks(2).run(collective_tasks.lone_messages)
    assert first.calls == [("world", "send"), ("world", "receive"), ("world", "send")]
    assert last.calls == [("world", "send"), ("world", "receive"), ("world", "receive")]
    assert len(first.durations_s) == len(last.durations_s) == 3


def test_an_exchange_has_its_groups_name_and_takes_as_long_as_the_slowest_rank(ranks):
    early, late = ranks(2).run(collective_tasks.own_exchange)
    assert early.calls == late.calls == [("expert", "all_to_all")]
    assert early.durations_s[0] > late.durations_s[0] > 0


def test_nothing_is_told_afterwards(ranks):
    for seen in ranks(2).run(collective_tasks.after_observing):
        assert seen.calls == [("world", "all_reduce")]


def test_works_are_kept_until_they_are_waited_for_and_no_more_than_so_many(ranks):
    """Beyond that they work as ever, untimed."""
    assert ranks(2).run(collective_tasks.works_left, 3, 5) == [(3, 0, 3)] * 2
    assert ranks(2).run(collective_tasks.works_left, 8, 5) == [(5, 0, 5)] * 2
