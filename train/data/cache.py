"""A folder of derived data that is made once: whole or absent, whoever is interrupted or comes at the same time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from octofold.backends.errors import UserError


def cache_root(configured: str | None) -> Path:
    """`data.cache_dir`, else $OCTOFOLD_CACHE, else ~/.cache/octofold; absolute."""
    return Path(configured or os.environ.get("OCTOFOLD_CACHE") or "~/.cache/octofold").expanduser().absolute()


def fingerprint(*facts: object) -> str:
    """Sixteen hex digits that change with any of these JSON values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(partial folder)` unless it is there already.

    Built aside and renamed under a file lock: an interrupted build leaves a partial folder that the next one removes,
    and of several processes one builds while the others wait.

    Raises:
        UserError: the place cannot be written.
    """
    from filelock import FileLock

    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                build(partial)
                partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: {error}\n"
            f"  rule:   prepared data is written there\n"
            f"  remedy: make room, mend permissions, or name another folder (data.cache_dir, $OCTOFOLD_CACHE, run_dir)"
        ) from error
    return folder


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
