"""A file that lines are appended to and that outlives a full disk: lines wait in memory until there is room again."""

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

KEPT_LINES = 100_000
"""That wait in memory; the oldest beyond these are lost, and counted."""


class LineFile:
    """Appends whole lines. What cannot be written now is tried again with the next line."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """
        Args:
            warn: is told when lines begin to wait, are lost, and have been written after all.

        Raises:
            OSError: the file cannot be opened.
        """
        self._path, self._warn = path, warn
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting: deque[bytes] = deque()
        self._failing = False
        self._lost = 0

    def append(self, line: str) -> None:
        """Add a line (without its end); it is in the operating system's hands when this returns, unless that failed."""
        self._waiting.append(line.encode("utf-8") + b"\n")
        while len(self._waiting) > KEPT_LINES:
            self._waiting.popleft()
            self._lost += 1
        self._flush()

    def close(self) -> None:
        """Write what waits, or tell how much is lost; may be called twice."""
        if self._descriptor is None:
            return
        self._flush()
        if self._waiting or self._lost:
            self._warn(f"{self._path}: {len(self._waiting) + self._lost} line(s) are lost")
        os.close(self._descriptor)
        self._descriptor = None

    def _flush(self) -> None:
        assert self._descriptor is not None, "closed"
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                text = f"{self._path} cannot be written: {error.strerror}; training goes on, lines wait in memory"
                self._warn(text)
            self._failing = True
            return
        if self._failing:
            self._failing = False
            self._warn(f"{self._path} can be written again; {self._lost or 'no'} line(s) are lost")

    def _write(self, data: bytes) -> None:
        """Write all of it or nothing."""
        assert self._descriptor is not None
        end = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise
