"""Which differences between ranks' sequences of calls are told, and that a real step has none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.backends.recording import Record, first_difference

SUM = Record("all_reduce", "world", (0, 1, 2), ((4,),), ("float64",))
EXCHANGE = Record("all_to_all", "expert", (0, 1), ((7, 3),), ("float32",))
PAIR = Record("all_reduce", "tensor", (1, 2), ((2, 2),), ("float32",))
SEND = Record("send", "pipeline", (0, 1), ((5,),), ("float32",), peer=1)
RECEIVE = Record("receive", "pipeline", (0, 1), ((5,),), ("float32",), peer=0)


BLOCKS = replace(EXCHANGE, sent=(3, 4), expected=(3, 2))
PEERS_BLOCKS = replace(EXCHANGE, shapes=((5, 3),), sent=(2, 3), expected=(4, 3))


def sequences() -> list[list[Record]]:
    """Of three ranks that agree."""
    return [
        [SUM, replace(EXCHANGE, shapes=((0, 3),)), SEND, SUM],
        [SUM, EXCHANGE, PAIR, SUM, RECEIVE],
        [SUM, PAIR, SUM],
    ]


def test_ranks_that_agree():
    assert first_difference(sequences()) is None
    assert first_difference([[], []]) is None


def test_blocks_of_an_exchange_are_as_large_as_the_receiver_expects():
    assert first_difference([[BLOCKS], [PEERS_BLOCKS]]) is None
    told = first_difference([[BLOCKS], [replace(PEERS_BLOCKS, expected=(5, 3))]])
    assert told == "call 1: all_to_all on expert: rank 0 sends 4 row(s) to rank 1, which expects 5"
    told = first_difference([[BLOCKS], [replace(PEERS_BLOCKS, sent=(1, 4))]])
    assert told == "call 1: all_to_all on expert: rank 1 sends 1 row(s) to rank 0, which expects 2"


Change = Callable[[list[list[Record]]], Any]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: s[1].remove(EXCHANGE),
            "call 2: rank 0 issued all_to_all(float32[0, 3]) on expert [0, 1], "
            "rank 1 issued all_reduce(float64[4]) on world [0, 1, 2]",
        ),
        (lambda s: s[2].pop(), "call 2: rank 0 issued all_reduce(float64[4]) on world [0, 1, 2], "
                               "rank 2 issued nothing more"),
        (lambda s: s[2].__setitem__(1, replace(PAIR, shapes=((4,),))), "float32[4]"),
        (lambda s: s[2].__setitem__(1, replace(PAIR, dtypes=("bfloat16",))), "bfloat16[2, 2]"),
        (lambda s: s[2].__setitem__(1, replace(PAIR, op="broadcast", peer=1)), "broadcast"),
        (lambda s: s[2].reverse() or s[2].pop(0), "rank 2"),
        (lambda s: s[1].__setitem__(1, replace(EXCHANGE, shapes=((7, 4),))), "float32[7, 4]"),
        (lambda s: s[1].pop(), "message from rank 0 to rank 1, 1: rank 0 issued send(float32[5]) to rank 1 on pipeline "
                               "[0, 1], rank 1 issued nothing more"),
        (lambda s: s[1].__setitem__(4, replace(RECEIVE, shapes=((6,),))), "receive(float32[6]) from rank 0"),
        (lambda s: s[0].append(replace(RECEIVE, peer=1)), "message from rank 1 to rank 0, 1: rank 0 issued receive"),
    ],
)  # fmt: skip
def test_a_difference_is_told(change: Change, told: str):
    changed = sequences()
    change(changed)
    assert told in (first_difference(changed) or "")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("runs"))


def four_ranks(root, steps=1):
    train = {"steps": steps, "micro_batch_size": 1}
    return tiny_run(root, 4, parallel={"data_shard": 4, "expert": 2}, train=train)


def test_a_training_step_has_one_sequence(root, ranks, tmp_path):
    records = ranks(4).run(run_tasks.record_calls, four_ranks(root), tmp_path)
    assert first_difference(records) is None
    for of_rank in records:
        found = {(record.group, record.op) for record in of_rank}
        assert {("expert", "all_to_all"), ("expert_data", "all_gather"), ("expert_data", "reduce_scatter")} <= found
        assert ("world", "all_reduce") in found


def test_a_planted_row_that_nobody_expects_is_told(root, ranks, tmp_path):
    """Of a real step's exchanges, whose blocks are known on both sides."""
    records = ranks(4).run(run_tasks.record_calls, four_ranks(root), tmp_path)
    number, call = next((n, r) for n, r in enumerate(records[1]) if r.op == "all_to_all" and r.sent)
    records[1][number] = replace(call, sent=(call.sent[0] + 1, *call.sent[1:]))
    told = first_difference(records)
    assert told is not None
    assert f"rank 1 sends {call.sent[0] + 1} row(s) to rank 0, which expects {call.sent[0]}" in told


def test_a_planted_collective_that_depends_on_data_is_told(root, ranks, tmp_path):
    """The rank with most tokens for an expert leaves a sum out; the others wait for it in vain."""
    records = ranks(4).run(run_tasks.record_planted_calls, four_ranks(root), tmp_path)
    told = first_difference(records)
    assert told is not None
    assert "all_reduce(float64[1]) on planted [0, 1, 2, 3]" in told
