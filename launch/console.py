"""Rank 0's log on the console: a rank that is killed has still written its last lines to the file."""

import sys
from pathlib import Path


class Follower:
    """Copies to standard output what is appended to a file."""

    def __init__(self, path: Path) -> None:
        """What the file holds already is not copied."""
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def copy(self) -> None:
        """Copy what has come since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return  # it comes with the rank's first line, or the disk is away: the console is no reason to stop
        self._at += len(data)
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
