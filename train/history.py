"""A run's history: who began it, continued it, from which step and with which changes. Torch-free.

One JSON object a line in `RUN/history.jsonl`, only ever appended to, by one process at a time:

    begin   ranks                             from initial weights
    resume  asked, from, changes, allowed     `octofold train` was told to continue
    load    step, checkpoint, skipped, ranks  the ranks stand where this checkpoint was saved
    failure rank, node, message, restart      what ended an attempt first, and the number of the attempt that follows
    end     status, signal                    the command that started the ranks ended

`asked` is what the user gave (auto, latest, a path) and `from` the run or checkpoint that it means; `changes` are those
of config.yaml (launch/changes.py), `allowed` is resume_allow. Newer checkpoints were `skipped` for the reasons given. A
restart by the launcher has no `resume` before its `load`. Of a `failure`, `rank` is null where all hung, `node` where
there is one, and `restart` where no attempt follows. A command that was killed has left no `end`.

Each has `event`, `time` (UTC), `user`, `host` and `version` (Octofold's).
"""

import getpass
import json
import socket
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HISTORY_FILE = "history.jsonl"


def append(run_dir: Path, event: str, **facts: Any) -> None:
    """Add an event, as the last line.

    Args:
        event: see above.
        facts: values that JSON knows.
    """
    record = {
        "event": event,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": _user(),
        "host": socket.gethostname(),
        "version": octofold_version(),
        **facts,
    }
    with (run_dir / HISTORY_FILE).open("a", encoding="utf-8") as file:
        # A line torn by a crash must not swallow this one.
        file.write(f"{'' if _ends_whole(run_dir / HISTORY_FILE) else chr(10)}{json.dumps(record)}\n")


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; lines torn by a crash are passed over."""
    path = run_dir / HISTORY_FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def octofold_version() -> str:
    """Of the installed package; empty where the sources are used without one."""
    try:
        return version("octofold")
    except PackageNotFoundError:
        return ""


def _ends_whole(path: Path) -> bool:
    """Whether the file is empty or its last line is complete."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user that has no name
        return ""
