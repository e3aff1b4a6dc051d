"""One job a run folder: two that train into it would tear each other's checkpoints and metrics. Torch-free."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octofold.backends.errors import ConfigError
from octofold.train.checkpoint.claim import CANNOT_LOCK

LOCK = "lock"
"""Holds host and process of the job. The lock ends with its process, however that ends; the file stays."""


@contextmanager
def locked(run_dir: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the run folder while the context lasts. On file systems without locks it is not held, with a warning.

    Args:
        wait_s: for a job to end that is about to, such as an attempt before this one.

    Raises:
        ConfigError: another process holds it, or the file cannot be opened.
    """
    path = run_dir / LOCK
    try:
        # A POSIX lock: processes forked from this one do not hold it.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        remedy = "free space, change its permissions, or run_dir"
        raise ConfigError("run_dir", str(path), f"the folder cannot be written: {error.strerror}", remedy) from error
    try:
        _lock(descriptor, path, wait_s)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait_s: float) -> None:
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline_s:
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
                rule = f"one job at a time trains into a folder, and {holder} does"
                raise ConfigError("run_dir", str(path.parent), rule, "wait for it to end, or stop it") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            print(f"octofold: {path} cannot be locked: {error.strerror}; start no second job there", file=sys.stderr)
            return
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError:
        return  # a full disk; the lock holds without a name
