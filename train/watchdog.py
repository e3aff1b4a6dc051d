"""Breaks hangs: sees that nothing moves, says where every thread stands and which ranks are missing, ends the process.

Each rank has a thread that looks at its own flight recorder (`octofold.backends.flight`) only. When that has seen
nothing for too long, the rank writes its stacks and its last collectives into the run's logs, reads what the other
ranks have written there, works out who is missing, and ends with `HANG_STATUS`, on which an elastic agent starts the
ranks again:

    logs/stacks_rank_N.txt   for people: stacks of all threads and the last collectives, appended
    logs/hang_rank_N.json    for the other ranks
    logs/hang.txt            the verdict
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from octofold.backends.flight import FlightRecorder, find_absent
from octofold.backends.observing import observed
from octofold.train.stop import HANG_STATUS, HANG_VERDICT

LONGER = 4
"""How much more time than between steps passes without a sign in the first step, an evaluation or a save."""
OTHERS_S = 10.0
"""How long to wait for what the other ranks write; they come to see the hang within a step's differences."""


class Watchdog:
    """Watches one rank. Without a timeout it only keeps the flight recorder running."""

    def __init__(
        self,
        flight: FlightRecorder,
        *,
        rank: int,
        ranks: int,
        timeout_s: float,
        logs: Path,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """
        Args:
            timeout_s: without a step or a collective that begins or ends; 0: for ever.
            logs: folder that all ranks see.
            end: ends the process with a status.
        """
        self.flight = flight
        self._rank, self._ranks, self._timeout_s, self._logs, self._end = rank, ranks, timeout_s, logs, end
        self._main = threading.get_ident()
        self._left = threading.Event()
        self._moved_s = time.monotonic()
        self._phases = ["first step"]
        self._step = 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Watch while the context lasts; `step` is the last one done."""
        self._main, self._step, self._phases = threading.get_ident(), step, ["first step"]
        self._moved_s = time.monotonic()
        self._left.clear()
        with suppress(OSError):
            self._file(self._rank).unlink(missing_ok=True)
        thread = threading.Thread(target=self._watch, name="octofold-watchdog", daemon=True)
        with observed(self.flight):
            if self._timeout_s:
                thread.start()
            try:
                yield
            finally:
                self._left.set()

    def step_done(self, step: int) -> None:
        """A step is done."""
        self._moved_s, self._step = time.monotonic(), step
        self._phases[0] = "training"

    def sign(self) -> None:
        """Something moves, such as a file that grows; any thread may say so."""
        self._moved_s = time.monotonic()

    @contextmanager
    def longer(self, phase: str) -> Iterator[None]:
        """Allow more time than between steps for what happens inside, such as a save."""
        self._moved_s = time.monotonic()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.pop()
            self._moved_s = time.monotonic()

    @property
    def allowance_s(self) -> float:
        """What may pass without a sign now."""
        return self._timeout_s * (1 if self._phases[-1] == "training" else LONGER)

    def _watch(self) -> None:
        poll_s = min(5.0, self._timeout_s / 20)
        looked_s = time.monotonic()
        while not self._left.wait(poll_s):
            now_s = time.monotonic()
            if now_s - looked_s > poll_s + self._timeout_s / 2:
                # This thread has not run either: the process was stopped (Ctrl-Z, a suspended machine), and goes on.
                self._moved_s = now_s
            looked_s = now_s
            quiet_s = now_s - max(self._moved_s, self.flight.moved_s)
            if quiet_s > self.allowance_s:
                self._break(quiet_s)
                return

    def _break(self, quiet_s: float) -> None:
        """Write down what this rank knows, wait for the others, say who is missing, end."""
        try:
            self._tell(quiet_s)
        finally:
            self._end(HANG_STATUS)

    def _tell(self, quiet_s: float) -> None:
        report = {**self.flight.report(), "quiet_s": round(quiet_s, 3), "at": self._standing()}
        try:
            self._write_stacks(quiet_s, report)
            draft = self._file(self._rank).with_suffix(".draft")
            draft.write_text(json.dumps(report), encoding="utf-8")
            draft.replace(self._file(self._rank))
            text = verdict(self._gather(), range(self._ranks))
            (self._logs / HANG_VERDICT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            text = f"{verdict({self._rank: report}, range(self._ranks))}\n  (not written to {self._logs}: {error})"
        where = f"stacks and last collectives of every rank: {self._logs}/stacks_rank_N.txt"
        phase = f"nothing has moved for {quiet_s:.1f} s ({self._phases[-1]}, after step {self._step})"
        print(f"octofold: {phase}; {text}\n  {where}", file=sys.stderr, flush=True)

    def _gather(self) -> dict[int, dict[str, Any]]:
        """The reports of all ranks, or of those that have written one in time."""
        reports: dict[int, dict[str, Any]] = {}
        deadline_s = time.monotonic() + min(OTHERS_S, self._timeout_s)
        while True:
            for rank in set(range(self._ranks)) - reports.keys():
                with suppress(FileNotFoundError):
                    reports[rank] = json.loads(self._file(rank).read_text(encoding="utf-8"))
            if len(reports) == self._ranks or time.monotonic() > deadline_s:
                return reports
            time.sleep(0.1)

    def _write_stacks(self, quiet_s: float, report: dict[str, Any]) -> None:
        lines = [
            f"=== {time.strftime('%Y-%m-%d %H:%M:%S')}: rank {self._rank}, process {os.getpid()}",
            f"nothing has moved for {quiet_s:.1f} s ({self._phases[-1]}, after step {self._step})",
            "",
        ]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for thread, frame in sys._current_frames().items():
            if thread != threading.get_ident():
                lines += [f"thread {names.get(thread, thread)}:", "".join(traceback.format_stack(frame))]
        lines.append("last collectives, newest first:")
        for call in reversed(report["recent"]):
            state = {True: "done", False: "WAITING", None: "issued"}[call["done"]]
            lines.append(f"  {state:8} {call['ago_s']:9.3f} s ago  number {call['count']}: {call['text']}")
        with (self._logs / f"stacks_rank_{self._rank}.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write("\n".join(lines) + "\n\n")

    def _standing(self) -> str:
        """Where the main thread is, outside of libraries if it is anywhere outside."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        stack = list(traceback.extract_stack(frame)) if frame else []
        own = [line for line in stack if "site-packages" not in line.filename and "/lib/python" not in line.filename]
        line = (own or stack)[-1] if stack else None
        return f"{Path(line.filename).name}:{line.lineno} in {line.name}" if line else "no Python code"

    def _file(self, rank: int) -> Path:
        return self._logs / f"hang_rank_{rank}.json"


def verdict(reports: dict[int, dict[str, Any]], ranks: range) -> str:
    """Which ranks are missing, in words.

    Args:
        reports: of `FlightRecorder.report`, with `at`: where the rank stands.
        ranks: all.
    """
    found = find_absent(reports)
    silent = [rank for rank in ranks if rank not in reports]
    lines = []
    for rank in found.absent:
        waiting = {other: calls[rank] for other, calls in found.waits.items() if rank in calls}
        stands = f"it stands at {reports[rank]['at']}" if rank in reports else "it gives no sign (stopped, or gone)"
        call = next(iter(waiting.values()))
        lines.append(f"rank {rank} did not arrive at {call}, where rank(s) {sorted(waiting)} wait: {stands}")
    lines += [f"rank {rank} gives no sign (stopped, or gone)" for rank in silent if rank not in found.absent]
    if not lines and found.waits:
        lines = ["ranks wait for one another in a circle:"]
        for rank, calls in sorted(found.waits.items()):
            other, call = next(iter(calls.items()))
            lines.append(f"  rank {rank} for rank {other} in {call}")
    if not lines:
        lines = ["no rank is missing in a collective; the ranks stand at:"]
        lines += [f"  rank {rank}: {report['at']}" for rank, report in sorted(reports.items())]
    return "\n".join(lines)
