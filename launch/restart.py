"""A job that its agent has started again goes on from what it has saved so far. Torch-free."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import MANIFEST, checkpoints

_BEGAN = "logs/began"
"""Its age tells what the job has saved from what it found."""


def restarts() -> int:
    """How often torchrun's agent, or ours, has started this job's ranks again."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def mark_start(run_dir: Path) -> None:
    """Note that a job begins in this folder; not for an attempt that follows another.

    Raises:
        ConfigError: the folder for logs cannot be written.
    """
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        _mistake(run_dir).unlink(missing_ok=True)
        (run_dir / _BEGAN).write_bytes(b"")
    except OSError as error:
        rule = f"ranks write their logs there: {error.strerror}"
        remedy = "free space, change its permissions, or run_dir"
        raise ConfigError("run_dir", str(run_dir / "logs"), rule, remedy) from error


def after_restart(config: JobConfig, run_dir: Path) -> JobConfig:
    """The job of another attempt: it continues from the newest checkpoint that an earlier one saved, or begins anew.

    A job that began from an older checkpoint than the newest one returns to the older until it has saved its own.

    Args:
        config: of the first attempt.

    Raises:
        UserError: the earlier attempt ended with it.
    """
    if _mistake(run_dir).exists():
        raise UserError(_mistake(run_dir).read_text(encoding="utf-8"))
    found = checkpoints(run_dir)
    began = run_dir / _BEGAN
    if not found or (began.exists() and (found[-1] / MANIFEST).stat().st_mtime < began.stat().st_mtime):
        return config
    return replace(config, resume=str(run_dir))


def leave_mistake(run_dir: Path, error: UserError) -> None:
    """Tell the attempts that a launcher will start, for all it knows, that they would end in the same way."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        with suppress(OSError):  # without the note they find out themselves
            _mistake(run_dir).write_text(str(error), encoding="utf-8")


def _mistake(run_dir: Path) -> Path:
    """What the user was told in an earlier attempt of this job; other jobs may meet in the same folder."""
    return run_dir / "logs" / f"mistake_{re.sub(r'[^A-Za-z0-9._-]', '_', os.environ.get('TORCHELASTIC_RUN_ID', ''))}"
