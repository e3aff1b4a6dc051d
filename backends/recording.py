"""Proof that ranks agree on what they say to one another: the sequence of calls of each rank, and the first difference.

A rank that issues a collective which another leaves out (because it has no tokens, say) hangs the job, or worse, pairs
unlike messages. Recorded sequences show where that began.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from octofold.backends.observing import Call, group_name, observed


@dataclass(frozen=True)
class Record:
    """A call as plain values, which can leave the process."""

    op: str
    group: str
    ranks: tuple[int, ...]
    """The group's, global ones."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    peer: int | None = None
    """Global rank: the other end of a send or receive, or the root."""
    sent: tuple[int, ...] | None = None
    """all_to_all of uneven blocks: rows meant for each rank of the group."""
    expected: tuple[int, ...] | None = None
    """all_to_all of uneven blocks: rows expected from each."""

    def __str__(self) -> str:
        tensors = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=True))
        end = {"send": f" to rank {self.peer}", "receive": f" from rank {self.peer}"}.get(self.op, "")
        return f"{self.op}({tensors}){end} on {self.group} {list(self.ranks)}"


@contextmanager
def recorded() -> Iterator[list[Record]]:
    """The calls that this process issues in the context, in order; the list fills while they happen."""
    recorder = _Recorder([])
    with observed(recorder):
        yield recorder.records


def first_difference(records: list[list[Record]]) -> str | None:
    """None where all ranks issued the same sequence; else what differs first, between which ranks.

    Two ranks must issue the calls of all groups that hold both in one order, with equal names, groups, roots, dtypes
    and shapes. Rows may differ between ranks in an all-to-all, but as many as one rank means for another must be those
    that the other expects; what only a root gives is not compared. What one rank sends to another must be what the
    other receives from it, in order.

    Args:
        records: of each global rank, from `recorded`.
    """
    for rank, own in enumerate(records):
        for other in range(rank + 1, len(records)):
            if text := _difference(rank, own, other, records[other]):
                return text
    return None


@dataclass
class _Recorder:
    records: list[Record]

    def on_call(self, call: Call) -> None:
        ranks = dist.get_process_group_ranks(call.group)
        self.records.append(
            Record(
                call.op,
                group_name(call.group),
                tuple(ranks),
                tuple(tuple(tensor.shape) for tensor in call.inputs),
                tuple(str(tensor.dtype).removeprefix("torch.") for tensor in call.inputs),
                None if call.peer is None else ranks[call.peer],
                tuple(call.splits) if call.splits else None,
                tuple(call.expected) if call.expected else None,
            )
        )


MESSAGES = ("send", "receive")


def _difference(rank: int, own: list[Record], other: int, others: list[Record]) -> str | None:
    def shared(records: list[Record]) -> list[Record]:
        return [r for r in records if {rank, other} <= set(r.ranks) and r.op not in MESSAGES]

    sequences = [
        ("call", shared(own), shared(others)),
        (
            f"message from rank {rank} to rank {other},",
            _messages(own, "send", other),
            _messages(others, "receive", rank),
        ),
        (
            f"message from rank {other} to rank {rank},",
            _messages(own, "receive", other),
            _messages(others, "send", rank),
        ),
    ]
    for what, mine, theirs in sequences:
        for number in range(max(len(mine), len(theirs))):
            a = mine[number] if number < len(mine) else None
            b = theirs[number] if number < len(theirs) else None
            if a is None or b is None or _compared(a) != _compared(b):
                return f"{what} {number + 1}: rank {rank} {_told(a)}, rank {other} {_told(b)}"
            if text := _unlike_rows(rank, a, other, b) or _unlike_rows(other, b, rank, a):
                return f"{what} {number + 1}: {text}"
    return None


def _unlike_rows(sender: int, sent: Record, receiver: int, received: Record) -> str | None:
    """How many rows of an all-to-all the sender means for the receiver, where that expects others."""
    if sent.sent is None or received.expected is None:
        return None
    meant = sent.sent[sent.ranks.index(receiver)]
    expected = received.expected[received.ranks.index(sender)]
    if meant == expected:
        return None
    counts = f"{sent.op} on {sent.group}: rank {sender} sends {meant} row(s) to rank {receiver}"
    return f"{counts}, which expects {expected}"


def _messages(records: list[Record], op: str, peer: int) -> list[Record]:
    return [record for record in records if record.op == op and record.peer == peer]


def _compared(record: Record) -> tuple[object, ...]:
    """What must be equal on both ranks."""
    if record.op in MESSAGES:
        return record.group, record.ranks, record.shapes, record.dtypes
    shapes: tuple[tuple[int, ...], ...] = record.shapes
    if record.op == "all_to_all":
        shapes = tuple(shape[1:] for shape in shapes)
    given = () if record.op == "scatter" else (shapes, record.dtypes)
    return record.op, record.group, record.ranks, record.peer, *given


def _told(record: Record | None) -> str:
    return "issued nothing more" if record is None else f"issued {record}"
