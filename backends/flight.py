"""The flight recorder: a rank's last collectives, who waits for whom when nothing moves, and the time spent on calls.

Always on, so that a hang finds it running: a short ring, counts by channel, and no tensor. A channel is a group of
ranks, or for messages a pair of ranks in one direction; ranks that belong to it count the same calls.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from octofold.backends.observing import Call, Told, group_name
from octofold.backends.recording import MESSAGES, Record

KEPT = 32
"""Calls that are remembered."""


@dataclass(slots=True)
class Flown:
    """A call, without its tensors."""

    channel: str
    count: int
    """Which call of its channel this is, from 1."""
    ranks: tuple[int, ...]
    """Global ranks that take part."""
    issued_s: float
    """By `time.monotonic`."""
    done: bool | None
    """None: the host cannot see it (accelerators)."""
    op: str
    group: "_Group"
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    peer: int | None

    def __str__(self) -> str:
        """As `recording.Record` says it; put together when somebody asks."""
        shapes = tuple(tuple(shape) for shape in self.shapes)
        dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return str(Record(self.op, self.group.name, self.group.ranks, shapes, dtypes, self.peer))


@dataclass(frozen=True)
class _Group:
    name: str
    ranks: tuple[int, ...]
    channel: str


class FlightRecorder:
    """An observer (`observing.observed`) of the calls of this rank. Threads may ask while others call."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._recent: deque[Flown] = deque(maxlen=KEPT)
        self._open: dict[int, Flown] = {}
        self._counts: dict[str, int] = {}
        self._groups: dict[str, _Group] = {}
        self._opened_s = self._in_flight_s = 0.0
        self.moved_s = time.monotonic()
        """When a call was last issued or complete."""

    def on_call(self, call: Call) -> Told | None:
        """Remember a call."""
        group = self._groups.get(call.group.group_name) or self._add_group(call.group)
        peer = None if call.peer is None else group.ranks[call.peer]
        channel, ranks = group.channel, group.ranks
        if call.op in MESSAGES:
            assert peer is not None
            ranks = (self._rank, peer) if call.op == "send" else (peer, self._rank)
            channel = f"{group.name} {ranks[0]}->{ranks[1]}"
        shapes, dtypes = [tensor.shape for tensor in call.inputs], [tensor.dtype for tensor in call.inputs]
        on_host = not any(tensor.device.type != "cpu" for tensor in call.inputs)
        with self._lock:
            count = self._counts[channel] = self._counts.get(channel, 0) + 1
            self.moved_s = now_s = time.monotonic()
            done = False if on_host else None
            flown = Flown(channel, count, ranks, now_s, done, call.op, group, shapes, dtypes, peer)
            self._recent.append(flown)
            if not on_host:
                return None
            if not self._open:
                self._opened_s = now_s
            self._open[id(flown)] = flown
        return partial(self._complete, flown)

    def _add_group(self, group: dist.ProcessGroup) -> _Group:
        name, ranks = group_name(group), tuple(dist.get_process_group_ranks(group))
        added = self._groups[group.group_name] = _Group(name, ranks, f"{name} {list(ranks)}")
        return added

    def _complete(self, flown: Flown, _took_s: float) -> None:
        with self._lock:
            flown.done = True
            self.moved_s = time.monotonic()
            self._open.pop(id(flown), None)
            if not self._open:
                self._in_flight_s += self.moved_s - self._opened_s

    def in_flight_s(self) -> float:
        """Seconds so far in which at least one call on the host was under way; constant on accelerators."""
        with self._lock:
            return self._in_flight_s + (time.monotonic() - self._opened_s if self._open else 0.0)

    def report(self) -> dict[str, Any]:
        """What another rank needs to know, as plain values: `counts` by channel, `recent` calls, oldest first."""
        with self._lock:
            calls = {id(flown): flown for flown in (*self._open.values(), *self._recent)}
            now_s = time.monotonic()
            recent = [
                {
                    "channel": flown.channel,
                    "count": flown.count,
                    "ranks": list(flown.ranks),
                    "text": str(flown),
                    "ago_s": round(now_s - flown.issued_s, 3),
                    "done": flown.done,
                }
                for flown in sorted(calls.values(), key=lambda flown: flown.issued_s)
            ]
            return {"counts": dict(self._counts), "recent": recent}


@dataclass
class Absence:
    """What ranks that stand still wait for."""

    absent: list[int]
    """Ranks that others wait for and that wait for nobody themselves; empty where ranks wait in a circle, or none does.
    """
    waits: dict[int, dict[int, str]] = field(default_factory=dict)
    """Rank -> ranks that it waits for -> the call to which these have not come."""


def find_absent(reports: Mapping[int, Mapping[str, Any]]) -> Absence:
    """Who has not come to a call that others wait in.

    Args:
        reports: `FlightRecorder.report` of the ranks that gave one; of the others nothing is known to have come.
    """
    waits: dict[int, dict[int, str]] = {}
    for rank, report in reports.items():
        for call in report["recent"]:
            if call["done"]:
                continue
            for other in set(call["ranks"]) - {rank}:
                if other not in reports or reports[other]["counts"].get(call["channel"], 0) < call["count"]:
                    waits.setdefault(rank, {}).setdefault(other, call["text"])
    awaited = {other for others in waits.values() for other in others}
    return Absence(sorted(awaited - waits.keys()), waits)
