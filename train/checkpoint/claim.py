"""One run at a time writes into a place of checkpoints. Torch-free.

On a disk a file `.owner` is locked for as long as the process lives, however it ends; the kernel lets go of it. (The
lock is POSIX's: it reaches over NFS, and a forked child does not hold it.) A store without locks holds an object
`owner.json` that its owner renews; it is stale when it is not renewed, or its process is gone from this machine. Two
runs that begin in a store within the same second may both take it: stores have no way to tell.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from octofold.backends.errors import ConfigError, UserError
from octofold.train.checkpoint.folders import Folder, LocalFolder

LOCK, OWNER = ".owner", "owner.json"
CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Of file systems without locks, such as Lustre mounted without flock."""
USERS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOENT)
"""What a person has to mend; other failures of a disk or a store may pass."""
BEAT_S = 15.0
"""How often an object is renewed; one that is not for twice as long is stale."""


@contextmanager
def claimed(checkpoints: Folder) -> Iterator[None]:
    """Own a place, which is made where it is missing and proved writable, until the context ends.

    Raises:
        UserError: another run owns it (says which process), or it cannot be written.
    """
    with ExitStack() as held:
        try:
            checkpoints.make()
            local = isinstance(checkpoints, LocalFolder)
            held.enter_context(_lock(Path(str(checkpoints))) if local else _renewed(checkpoints))
        except OSError as error:
            rule, remedy = f"it must be writable: {error.strerror or error}", "mend permissions, or name another place"
            refused = ConfigError("checkpoint.dir", str(checkpoints), rule, remedy)
            refused.status = 2 if error.errno in USERS else 1
            raise refused from None
        yield


def _who() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refuse(where: object, owner: dict[str, Any]) -> UserError:
    held = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
    return UserError(
        f"{where} is in use by another run: {held}\n  rule:   one run at a time saves checkpoints in a place\n"
        "  remedy: wait for that run or stop it, or name another run_dir or checkpoint.dir"
    )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        owner = {}
        with suppress(OSError, ValueError):
            owner = dict(json.loads(path.read_text()))
        raise _refuse(folder, owner) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the file at `path` that holds its lock.

    Raises:
        OSError: another process holds it, or it cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who let go of it in between has removed it, and the name means another file now.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_who()).encode())
                os.fsync(descriptor)
                return descriptor
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise BlockingIOError(*error.args) from None
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                os.close(descriptor)
                raise
            print(f"octofold: {path} cannot be locked: {error.strerror}; start no second run there", file=sys.stderr)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def _renewed(folder: Folder) -> Iterator[None]:
    with suppress(FileNotFoundError):
        owner = _owner(folder)
        if not _is_stale(owner):
            # Time alone cannot tell: clocks differ. Whoever lives renews it.
            time.sleep(2 * BEAT_S)
            if _owner(folder) != owner:
                raise _refuse(folder, owner)
    mine = {**_who(), "beat": 0}
    folder.write(OWNER, json.dumps(mine).encode())
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(folder, mine, ended), name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            folder.delete(OWNER)


def _owner(folder: Folder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.read(OWNER)))
    except ValueError:
        return {}


def _is_stale(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to be gone: a process of this machine that no longer lives."""
    if owner.get("host") != socket.gethostname():
        return not owner
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(owner["pid"]) == os.getpid()


def _renew(folder: Folder, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        mine["beat"] += 1
        # A store that is away for a while is told of when a checkpoint is saved.
        with suppress(OSError):
            folder.write(OWNER, json.dumps(mine).encode())
