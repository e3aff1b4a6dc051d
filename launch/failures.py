"""Which rank failed first: ranks leave notes of their failures, since the first one breaks the others' calls.

A note is RUN/logs/failure_rank_N.json: time, rank, message, and whether the user can mend it. Torch-free.
"""

import json
import signal
import sys
import time
import traceback
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octofold.backends.errors import UserError
from octofold.train.stop import HANG_STATUS, HANG_VERDICT

LOG_LINES_SHOWN = 15
SECOND_NS = 10**9
USERS_MISTAKE = 2
"""Exit status of a process that ends with a `UserError`."""


class SlowNodesError(UserError):
    """That a job's nodes cannot begin together because of some that are slow."""

    def __init__(self, message: str, nodes: Iterable[int]) -> None:
        """
        Args:
            nodes: their numbers, in the order of ranks.
        """
        super().__init__(message)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    status: int
    """Exit status for the whole job: 1, or 2 for a user's mistake."""
    message: str
    cause: str | None = None
    """The traceback that a rank left; None where it was killed or left nothing."""
    rank: int | None = None
    """The rank that failed first; None where all hung."""
    time_ns: int = 0
    """When, by its node's clock; of a rank that was killed, the second in which that was noticed."""
    slow: tuple[int, ...] = ()
    """Nodes that the preflight found slow, in the order of ranks."""


def leave_note(logs: Path, rank: int, error: BaseException) -> None:
    """Note a rank's failure, and put the traceback into its log. A folder that takes neither gets stderr instead."""
    lines = traceback.format_exception(error)
    is_users = isinstance(error, UserError) and error.status == USERS_MISTAKE
    passes = isinstance(error, UserError) and not is_users
    message = str(error) if isinstance(error, UserError) else "".join(lines)
    try:
        with (logs / f"rank_{rank}.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
        slow = error.nodes if isinstance(error, SlowNodesError) else ()
        leave_message(logs, rank, message, is_users=is_users, passes=passes, slow=slow)
    except OSError as reason:
        print(f"rank {rank}: {''.join(lines)}  (not noted in {logs}: {reason})", file=sys.stderr)


def leave_message(
    logs: Path, rank: int, message: str, *, is_users: bool = False, passes: bool = False, slow: Sequence[int] = ()
) -> None:
    """Note a rank's failure.

    Args:
        is_users: only the user can mend it.
        passes: the same may go well later, such as a store that is away.
        slow: see `Failure`.

    Raises:
        OSError: the folder does not take it.
    """
    failure = {"time_ns": time.time_ns(), "rank": rank, "is_users": is_users, "passes": passes, "message": message}
    failure |= {"slow": list(slow)}
    path = logs / f"failure_rank_{rank}.json"
    # Whole or not at all: the disk may be full, and a rank that takes long over it is killed.
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(failure), encoding="utf-8")
    draft.replace(path)


def clear_notes(logs: Path, ranks: Container[int] | None = None) -> None:
    """Forget the failures of an earlier attempt; with `ranks` theirs only."""
    for stale in logs.glob("failure_rank_*.json"):
        if ranks is None or int(stale.stem.rpartition("_")[2]) in ranks:
            stale.unlink(missing_ok=True)


def first_failure(
    logs: Path, failures: dict[int, Any], *, interrupted: bool, ranks: Container[int] | None = None
) -> Failure | None:
    """The failure that the others followed from, or None if nothing failed.

    Args:
        logs: the run's log folder.
        ranks: those of this node, where other nodes leave notes of theirs in the same folder.
        failures: the agent's, by rank, each with its exit code and the second in which it was noticed.
        interrupted: a signal was passed on, so that ranks dead by a signal are no failure.
    """
    hung = [rank for rank, failure in failures.items() if failure.exitcode == HANG_STATUS]
    if hung and not interrupted:
        # Calls that these broke when they ended are a consequence.
        return Failure(1, _hang(logs, told=0 in hung), time_ns=failures[hung[0]].timestamp * SECOND_NS)
    noted = [json.loads(path.read_text(encoding="utf-8")) for path in logs.glob("failure_rank_*.json")]
    noted = [failure for failure in noted if ranks is None or failure["rank"] in ranks]
    if failures and not interrupted:
        first_s = min(failure.timestamp for failure in failures.values())
        for rank, failure in failures.items():
            # Killed from outside, or crashed: what the others noted (a lost connection) is its consequence. A rank
            # that the agent ended afterwards died of SIGTERM, or later.
            is_first = failure.timestamp == first_s
            if is_first and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                what = f"died of {signal.Signals(-failure.exitcode).name}"
                return Failure(1, _account(logs, rank, what, None), rank=rank, time_ns=first_s * SECOND_NS)
    if noted:
        first = min(noted, key=lambda failure: failure["time_ns"])
        rank, time_ns = first["rank"], first["time_ns"]
        if first["is_users"]:
            slow = tuple(first.get("slow", ()))
            return Failure(USERS_MISTAKE, first["message"], rank=rank, time_ns=time_ns, slow=slow)
        # Twice the same says nothing of what passes: a store may be away today and in a week.
        cause = None if first["passes"] else first["message"]
        return Failure(1, _account(logs, rank, "failed", first["message"]), cause, rank, time_ns)
    if failures and not interrupted:
        rank, failure = next(iter(failures.items()))
        what, time_ns = f"ended with exit status {failure.exitcode}", failure.timestamp * SECOND_NS
        return Failure(1, _account(logs, rank, what, None), rank=rank, time_ns=time_ns)
    return None


def _hang(logs: Path, *, told: bool) -> str:
    """Account of a hang; `told`: rank 0 has printed what was found out."""
    verdict = logs / HANG_VERDICT
    found = "" if told or not verdict.exists() else "; " + verdict.read_text(encoding="utf-8").rstrip()
    return f"the watchdog broke a hang{found} ({logs})"


def _account(logs: Path, rank: int, what: str, text: str | None) -> str:
    log = logs / f"rank_{rank}.log"
    if text is None:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    tail = "\n".join(f"  {line}" for line in text.splitlines()[-LOG_LINES_SHOWN:])
    where = f" ({log})" if log.exists() else " (its output is above)"
    return f"rank {rank} {what}{where}\n{tail}".rstrip()
