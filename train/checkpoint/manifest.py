"""What makes a folder of tensors a checkpoint: the size of every file, and everything that is no tensor, in JSON."""

import json
import os
from pathlib import Path
from typing import Any

from octofold.backends.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and the names of tensors; a reader refuses any other."""
REMEDY = "\n  remedy: resume from an earlier checkpoint of the run"


def write_manifest(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` and the size of every file beside the tensors, and flush all of it to the disk."""
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    document = json.dumps({"format": FORMAT, "state": state, "file_bytes": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(document)
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The state saved with a checkpoint, after a check that every file is there in full.

    Raises:
        UserError: the checkpoint is incomplete (says which file), or of another format.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text())
        version, state, files = document["format"], dict(document["state"]), dict(document["file_bytes"])
    except FileNotFoundError:
        raise UserError(f"{folder} is no complete checkpoint: {MANIFEST} is missing{REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error!r}{REMEDY}") from None
    if version != FORMAT:
        rule = f"\n  rule:   this version reads format {FORMAT}\n  remedy: resume with the version that wrote it"
        raise UserError(f"{folder / MANIFEST} has format {version}{rule}")
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            shown = "is missing" if found is None else f"holds {found} bytes"
            raise UserError(f"{path} {shown}, but {size} bytes were written{REMEDY}")
    return state
