"""Ctrl-C and SIGTERM as a wish: the step in hand is finished and saved before the run ends."""

import signal
import time
from types import FrameType, TracebackType


class StopSignals:
    """While entered, SIGINT and SIGTERM are remembered in `received`; a later repetition ends the process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO_S = 1.0
    """A terminal and a launcher both pass on one Ctrl-C: a repetition within this time is the same wish."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at_s = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.received == number and now_s - self._received_at_s > self.ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.received is None:
            self.received, self._received_at_s = number, now_s
