"""One rank that `octofold train` started, under torch's agent: `python -m octofold.launch.worker RUN_DIR PID [logged]`.

PID is the agent's. Rank 0 owns the console, unless it is to be logged too; the others write to RUN_DIR/logs/rank_N.log.
A rank that fails leaves failure_rank_N.json there, with the time, so that the parent can tell the first failure from
those it caused.
"""

import os
import signal
import sys
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.launch.failures import leave_note

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Train as the rank that the environment names; the exit status is 0, 1 for a failure or 2 for a user's mistake."""
    run_dir, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    rank = int(os.environ["RANK"])
    log = run_dir / "logs" / f"rank_{rank}.log"
    if rank or "logged" in sys.argv[3:]:
        _redirect_output(log, rank)
    # Until train() handles these itself, a rank that is told to stop has nothing to save and just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from octofold.launch.restart import UNTRIED, after_restart, restarts
        from octofold.launch.run_folder import read_config
        from octofold.train.main import train

        config = read_config(run_dir)
        before = None
        if config.launch.nodes > 1 and config.launch.preflight.links and os.environ.get(UNTRIED) == "1":
            from octofold.launch.preflight import links_check

            before = links_check(config.launch.preflight, config.backend)
        config = after_restart(config, run_dir) if restarts() else config
        train(config, run_dir, stop_deadline_s=config.launch.stop_deadline_s, before=before)
    except UserError as error:
        leave_note(log.parent, rank, error)
        return error.status
    except Exception as error:
        leave_note(log.parent, rank, error)
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


def _redirect_output(log: Path, rank: int) -> None:
    """Send this process's output, C++'s included, to a file that later attempts append to."""
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        print(f"rank {rank} writes here: {log} cannot be written: {error.strerror}", file=sys.stderr)
        return
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
