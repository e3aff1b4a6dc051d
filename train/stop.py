"""Being told to stop: the step in hand is finished and saved before the run ends, within a deadline. Torch-free."""

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

PREEMPTIONS = frozenset([signal.SIGTERM, signal.SIGUSR1])
"""What schedulers send before they take a machine away. A run that they stop, and that has saved, ended well."""
HANG_STATUS = 75
"""Exit status of a process that the watchdog ended: EX_TEMPFAIL, "try again"."""
HANG_VERDICT = "hang.txt"
"""In the run's logs: which ranks the watchdog found missing."""
POLL_S = 0.1


def exit_status(number: int | None) -> int:
    """Of a run that has saved after this signal (None: of one that nobody stopped): 0, or 128 + a person's signal."""
    return 0 if number is None or number in PREEMPTIONS else 128 + number


class StopSignals:
    """While entered, the first of `SIGNALS` is remembered as the wish to stop; a later Ctrl-C ends the process.

    What is ignored from outside (SIGHUP under nohup) or belongs to others than Python is left alone.
    """

    SIGNALS = (signal.SIGINT, signal.SIGHUP, *sorted(PREEMPTIONS))
    ECHO_S = 1.0
    """A terminal and a launcher both pass on one Ctrl-C: a repetition within this time is the same wish."""

    def __init__(self, deadline_s: float = math.inf) -> None:
        """`deadline_s`: after the wish; a process still inside the context then ends with 128 + signal, unsaved."""
        self.received: int | None = None
        self.agreed: int | None = None
        """The signal that all ranks know some rank has received (of a preemption: SIGTERM)."""
        self._deadline_s = deadline_s
        self._wished_at_s: float | None = None
        self._left = threading.Event()
        self._saved = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.SIGNALS:
            before = signal.getsignal(number)
            if before is None or (before == signal.SIG_IGN and number != signal.SIGINT):
                continue
            self._previous[number] = signal.signal(number, self._remember)
        if math.isfinite(self._deadline_s):
            # Waits by itself: a handler that starts threads or takes locks may interrupt somebody who does.
            threading.Thread(target=self._keep_deadline, name="octofold-stop", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._left.set()

    def wishes(self) -> list[float]:
        """What this rank has received, to be summed over ranks: [a person's signal, a preemption], each 0 or 1."""
        return [float(self.received is not None and by == (self.received in PREEMPTIONS)) for by in (False, True)]

    def agree(self, wishes: list[float]) -> bool:
        """Whether all ranks stop now, from the sum of their `wishes`; the deadline counts on every rank then."""
        for count, number in zip(wishes, (signal.SIGINT, signal.SIGTERM), strict=True):
            if count and self.agreed is None:
                self.agreed = number
                self._wished_at_s = self._wished_at_s or time.monotonic()
        return self.agreed is not None

    def all_saved(self) -> None:
        """From now on a wish to stop, or one that came too late for the loop, ends the process at once, and well."""
        self._saved = True
        if number := self.received or self.agreed:
            self._leave(number)

    def _leave(self, number: int) -> None:
        said = f"octofold: ended by {signal.Signals(number).name} in the closing evaluation; the last step is saved"
        # Not through Python's streams: the signal may have come while one of them is written.
        with suppress(OSError):
            os.write(2, f"{said}\n".encode())
        os._exit(exit_status(number))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._saved:
            self._leave(number)
        now_s = time.monotonic()
        if self.received is None:
            self.received, self._wished_at_s = number, self._wished_at_s or now_s
        elif number == signal.SIGINT and now_s - (self._wished_at_s or now_s) > self.ECHO_S:
            # A person's impatience. Schedulers repeat themselves, too; the deadline bounds what they wait for.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _keep_deadline(self) -> None:
        while not self._left.wait(POLL_S):
            if self._wished_at_s is not None and time.monotonic() - self._wished_at_s > self._deadline_s:
                number = signal.Signals(self.received or self.agreed or signal.SIGTERM)
                text = f"octofold: ended {self._deadline_s:g} s after {number.name}, before the step was saved"
                print(f"{text}; the newest complete checkpoint stands", file=sys.stderr, flush=True)
                os._exit(128 + number)
