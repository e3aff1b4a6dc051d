"""`octofold status`: how far a run is, how often it was started again, and what failed last. Torch-free."""

import fcntl
import json
import os
import struct
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octofold.backends.errors import UserError
from octofold.launch.run_folder import read_config, saved_checkpoints
from octofold.launch.run_lock import LOCK
from octofold.train.history import read_history
from octofold.train.metrics import METRICS_FILE, read_metrics

MESSAGE_LINES = 12
_FLOCK = "@hhqqi"
"""struct flock of 64-bit Linux: type, whence, start, length, process."""


@dataclass(frozen=True)
class Status:
    """What a run's folder tells."""

    run_dir: str
    state: str
    """running, done, stopped (by a signal), failed, or gone (ended without a word)."""
    holder: str | None
    """Process and host of the command that trains into the folder."""
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    age_s: float | None
    """Since the newest metrics were written."""
    left_s: float | None
    """At the speed of the newest metrics."""
    checkpoint: str | None
    restarts: int
    """Of the job that began last."""
    standing_by: dict[str, str]
    """Node -> why it runs no ranks, of a job with launch.min_nodes."""
    failure: dict[str, Any] | None
    """The last of that job: `rank`, `node`, `message`, `restart`, `time`."""


def status_of(run_dir: Path) -> Status:
    """Read a run's folder; nothing is written.

    Raises:
        UserError: it holds no run.
    """
    config = read_config(run_dir)
    records = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
    trained = [record for record in records if record["kind"] == "train"]
    last = trained[-1] if trained else {}
    events = read_history(run_dir)
    # What belongs to the job that began last.
    starts = [number for number, event in enumerate(events) if event["event"] in ("begin", "resume")]
    first = starts[-1] if starts else 0
    while first and events[first - 1]["event"] == "nodes":  # told before ranks begin
        first -= 1
    own = events[first:]
    failures = [event for event in own if event["event"] == "failure"]
    ends = [event for event in own if event["event"] == "end"]
    nodes = [event for event in own if event["event"] == "nodes"]
    holder = _holder(run_dir / LOCK)
    step, steps = int(last.get("step", 0)), config.train.steps
    saved = saved_checkpoints(run_dir, config.checkpoint.dir)
    return Status(
        run_dir=str(run_dir),
        state="running" if holder else _ended(ends[-1] if ends else None, step >= steps),
        holder=holder,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        age_s=time.time() - (run_dir / METRICS_FILE).stat().st_mtime if records else None,
        left_s=(steps - step) * last["step_s"] if last.get("step_s") else None,
        checkpoint=str(saved[-1]) if saved else None,
        restarts=sum(event["restart"] is not None for event in failures),
        standing_by=nodes[-1]["standing_by"] if nodes else {},
        failure=failures[-1] if failures else None,
    )


def _ended(end: dict[str, Any] | None, complete: bool) -> str:
    if end is None:
        return "done" if complete else "gone"
    if end["signal"]:
        # A person's signal leaves 128 + signal whether it has saved or not; so does a deadline that was missed.
        return "stopped"
    return "done" if end["status"] == 0 else "failed"


def _holder(path: Path) -> str | None:
    """Who holds the run's lock: the text that it left, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be told: {path}: {error.strerror}"
    try:
        # Asks, and takes nothing: a job that is about to begin must not find the folder held by a question.
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        if answer[0] == fcntl.F_UNLCK:
            return None
        return os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
    except OSError:  # a file system without locks, on which none is held
        return None
    finally:
        os.close(descriptor)


def run(argv: list[str]) -> int:
    """Print the status of a run; 0 where it is running, done or stopped, else 1.

    Args:
        argv: a run folder, and --json.

    Raises:
        UserError: other arguments, or no run.
    """
    folders = [text for text in argv if text != "--json"]
    if len(folders) != 1 or folders[0].startswith("-"):
        rule = "it takes a run folder, and --json"
        raise UserError(f"status {' '.join(argv)}\n  rule:   {rule}\n  remedy: octofold status RUN")
    found = status_of(Path(folders[0]).expanduser().absolute())
    print(json.dumps(asdict(found), indent=2) if "--json" in argv else "\n".join(_lines(found)))
    return 1 if found.state in ("failed", "gone") else 0


def _lines(status: Status) -> list[str]:
    told = f" ({status.holder})" if status.holder else ""
    lines = [f"run         {status.run_dir}", f"state       {status.state}{told}"]
    progress = f"step        {status.step} of {status.steps}"
    if status.loss is not None:
        progress += f", loss {status.loss:.4g}, {status.tokens_per_s or 0:,.0f} tokens/s"
    if status.state == "running" and status.left_s is not None:
        progress += f", {_time(status.left_s)} left, written {_time(status.age_s or 0)} ago"
    lines += [progress, f"checkpoint  {status.checkpoint or 'none yet'}", f"restarts    {status.restarts}"]
    lines += [f"stands by   {node}: {why}" for node, why in status.standing_by.items()]
    if status.failure:
        failure = status.failure
        where = f" on {failure['node']}" if failure["node"] else ""
        who = f"rank {failure['rank']}{where}" if failure["rank"] is not None else "the ranks"
        lines.append(f"last error  {_when(failure['time'])}, {who}")
        lines += [f"  {line}" for line in failure["message"].splitlines()[:MESSAGE_LINES]]
    return lines


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _when(time_text: str) -> str:
    return datetime.fromisoformat(time_text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
