"""A job that its agent has started again goes on from what it has saved so far. Torch-free."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.train.checkpoint.checksums import IncompleteError, UnreadableError
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.manifest import MANIFEST
from octofold.train.checkpoint.validity import checkpoints_of, valid_checkpoints

UNTRIED = "OCTOFOLD_NODES_ARE_UNTRIED"
"""Variable of the ranks: 1 where nodes have not run ranks together before, 0 where they have."""
_BEGAN = "logs/began"
"""The manifest of the newest checkpoint that a job found when it began: what is newer is its own."""


def restarts() -> int:
    """How often torchrun's agent, or ours, has started this job's ranks again."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def mark_start(run_dir: Path, config: JobConfig) -> None:
    """Note that a job begins in this folder; not for an attempt that follows another.

    Raises:
        ConfigError: the folder for logs cannot be written.
    """
    newest = _newest(run_dir, config)
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        _mistake(run_dir).unlink(missing_ok=True)
        (run_dir / _BEGAN).write_bytes(b"" if newest is None else newest.read(MANIFEST))
    except OSError as error:
        rule = f"ranks write their logs there: {error.strerror}"
        remedy = "free space, change its permissions, or run_dir"
        raise ConfigError("run_dir", str(run_dir / "logs"), rule, remedy) from error


def after_restart(config: JobConfig, run_dir: Path) -> JobConfig:
    """The job of another attempt: it continues from the newest checkpoint that an earlier one saved.

    A job that began from an older checkpoint than the newest one returns to the older until it has saved its own. One
    that has published nothing begins anew.

    Args:
        config: of the first attempt.

    Raises:
        UserError: the earlier attempt ended with it.
    """
    if _mistake(run_dir).exists():
        raise UserError(_mistake(run_dir).read_text(encoding="utf-8"))
    checkpoints, began = checkpoints_of(run_dir, config.checkpoint.dir), run_dir / _BEGAN
    valid, skipped = valid_checkpoints(checkpoints)
    if not valid:
        # What is damaged, or out of reach, was published: to begin anew would leave it behind without a word.
        begins = all(isinstance(passed.error, IncompleteError) for passed in skipped)
    else:
        begins = began.exists() and began.read_bytes() == (checkpoints / f"step_{max(valid)}").read(MANIFEST)
    return config if begins else replace(config, resume=config.checkpoint.dir or str(run_dir))


def _newest(run_dir: Path, config: JobConfig) -> Folder | None:
    checkpoints = checkpoints_of(run_dir, config.checkpoint.dir)
    valid, _ = valid_checkpoints(checkpoints)
    return checkpoints / f"step_{max(valid)}" if valid else None


def has_saved(run_dir: Path, config: JobConfig) -> bool:
    """Whether the job that began here (`mark_start`), or another attempt of it, has published a checkpoint."""
    try:
        newest = _newest(run_dir, config)
        return newest is not None and newest.read(MANIFEST) != (run_dir / _BEGAN).read_bytes()
    except (OSError, UnreadableError):
        return True  # A place out of reach may well hold one.


def leave_mistake(run_dir: Path, error: UserError) -> None:
    """Tell the attempts that a launcher will start, for all it knows, that they would end in the same way."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        with suppress(OSError):  # without the note they find out themselves
            _mistake(run_dir).write_text(str(error), encoding="utf-8")


def _mistake(run_dir: Path) -> Path:
    """What the user was told in an earlier attempt of this job; other jobs may meet in the same folder."""
    return run_dir / "logs" / f"mistake_{re.sub(r'[^A-Za-z0-9._-]', '_', os.environ.get('TORCHELASTIC_RUN_ID', ''))}"
