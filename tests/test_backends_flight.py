"""The flight recorder: what it keeps of real calls, and whom it finds missing."""

import pytest
from collective_tasks import record_flight

from octofold.backends.flight import KEPT, find_absent


def report(counts, *waiting):
    """Of a rank that has made so many calls by channel and waits in the last ones of some."""
    calls = [
        {"channel": channel, "count": counts[channel], "ranks": ranks, "text": f"call on {channel}", "done": False}
        for channel, ranks in waiting
    ]
    return {"counts": counts, "recent": calls}


def test_the_rank_that_has_not_come_is_found():
    reports = {
        0: report({"world": 5}, ("world", [0, 1, 2])),
        1: report({"world": 4}),
        2: report({"world": 5}, ("world", [0, 1, 2])),
    }
    found = find_absent(reports)
    assert found.absent == [1]
    assert found.waits == {0: {1: "call on world"}, 2: {1: "call on world"}}


def test_a_rank_that_waits_itself_is_not_to_blame():
    reports = {
        0: report({"world": 5, "a": 1}, ("world", [0, 1, 2])),
        1: report({"world": 4, "b": 3}, ("b", [1, 2])),
        2: report({"world": 4, "b": 2}),
    }
    assert find_absent(reports).absent == [2]


def test_a_message_that_was_never_sent():
    waiting = ("pipe 0->1", [0, 1])
    reports = {0: report({"pipe 0->1": 3}), 1: report({"pipe 0->1": 4}, waiting)}
    assert find_absent(reports).absent == [0]


def test_a_rank_without_a_report_is_missing_where_others_wait():
    assert find_absent({0: report({"world": 5}, ("world", [0, 1, 2])), 2: report({"world": 4})}).absent == [1, 2]


def test_a_circle_has_nobody_to_blame():
    reports = {
        0: report({"a": 1, "b": 0}, ("a", [0, 1])),
        1: report({"a": 0, "b": 1}, ("b", [0, 1])),
    }
    found = find_absent(reports)
    assert found.absent == []
    assert set(found.waits) == {0, 1}


def test_a_call_to_which_all_have_come_blames_nobody():
    waiting = ("world", [0, 1])
    assert find_absent({0: report({"world": 5}, waiting), 1: report({"world": 5}, waiting)}).waits == {}


@pytest.fixture(scope="module")
def flights(ranks):
    return ranks(2).run(record_flight, 0.4)


def test_real_calls_are_kept_and_counted(flights):
    for flight in flights:
        assert len(flight["report"]["recent"]) == KEPT
        assert all(call["done"] for call in flight["report"]["recent"])
        channel = "world [0, 1]"
        assert flight["report"]["counts"][channel] == 3 + KEPT
        last = flight["report"]["recent"][-1]
        assert (last["channel"], last["count"], last["ranks"]) == (channel, 3 + KEPT, [0, 1])
        assert last["text"] == "all_reduce(float32[3]) on world [0, 1]"
    assert flights[0]["report"]["counts"]["world 0->1"] == flights[1]["report"]["counts"]["world 0->1"] == 2


def test_a_call_under_way_is_seen_from_another_thread(flights):
    meanwhile = flights[0]["meanwhile"]["recent"][-1]
    assert (meanwhile["done"], meanwhile["text"]) == (False, "all_reduce(float32[3]) on world [0, 1]")
    assert find_absent({0: flights[0]["meanwhile"], 1: {"counts": {}, "recent": []}}).absent == [1]


def test_time_in_flight_is_that_of_the_rank_that_waits(flights):
    waiting_s, late_s = (flight["in_flight_s"] for flight in flights)
    assert waiting_s > late_s
