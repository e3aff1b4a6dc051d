"""One rank that `octofold train` started: `python -m octofold.launch.worker RUN_DIR PARENT_PID`, under torch's agent.

Rank 0 owns the console; the others write to RUN_DIR/logs/rank_N.log. A rank that fails leaves failure_rank_N.json
there, with the time, so that the parent can tell the first failure from those it caused.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from octofold.backends.errors import UserError

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Train as the rank that the environment names; the exit status is 0, 1 for a failure or 2 for a user's mistake."""
    run_dir, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    rank = int(os.environ["RANK"])
    log = run_dir / "logs" / f"rank_{rank}.log"
    if rank:
        _redirect_output(log)
    # Until train() handles these itself, a rank that is told to stop has nothing to save and just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from octofold.launch.run_folder import read_config
        from octofold.train.main import train

        train(read_config(run_dir), run_dir)
    except UserError as error:
        _leave_failure(log, rank, error, is_users=True)
        return 2
    except Exception as error:
        _leave_failure(log, rank, error, is_users=False)
        raise SystemExit(1) from error
    return 0


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends.

    Args:
        parent: process id of the starter; if it is gone already, this process exits.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(1)


def _redirect_output(log: Path) -> None:
    """Send this process's output, C++'s included, to a file that later attempts append to."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _leave_failure(log: Path, rank: int, error: BaseException, is_users: bool) -> None:
    lines = traceback.format_exception(error)
    with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)
    message = str(error) if is_users else "".join(lines)
    failure = {"time_ns": time.time_ns(), "rank": rank, "is_users": is_users, "message": message}
    log.with_name(f"failure_rank_{rank}.json").write_text(json.dumps(failure), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
