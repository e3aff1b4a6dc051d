"""What makes a folder of tensors a checkpoint: checksums of every file, and all that is no tensor, in JSON. Torch-free.

The manifest also holds a checksum of itself:

    {"format": 2, "checksum": "…", "content": {"saved_at_s": …, "state": {…}, "made_by": {…}, "files": {…}}}

Format 1 had the sizes of files and no checksums; it is read, and no longer written.
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octofold.train.checkpoint.checksums import (
    REMEDY,
    DamagedError,
    FileRecord,
    IncompleteError,
    UnreadableError,
    checksum,
    record_of,
    unreadable,
)
from octofold.train.checkpoint.folders import Folder, folder_at
from octofold.train.checkpoint.patience import GONE, patiently

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest and the names of tensors; a reader refuses a later one."""
SUFFIX = ".safetensors"
"""Of the files that hold tensors; the manifest knows every one of them, and others do not count."""
STEP_FOLDER = re.compile(r"step_(\d+)")
"""The name of a published checkpoint."""
_SEALED = re.compile(rb'\{"format": (\d+), "checksum": "([0-9a-f]{16})", "content": (.*)\}\n', re.DOTALL)


@dataclass(frozen=True)
class Manifest:
    """What was said of a checkpoint when it was published."""

    state: dict[str, Any]
    """What a run continues from, beside tensors."""
    files: dict[str, FileRecord]
    """By name."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """The run: `version`, `world_size`, `config` (resolved)."""
    saved_at_s: float = 0.0
    """Seconds since 1970; 0 where it is not known."""
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Of all tensors' files."""
        return sum(record.nbytes for record in self.files.values())

    def sealed(self) -> bytes:
        """The document, with its own checksum."""
        content = {
            "saved_at_s": self.saved_at_s,
            "state": self.state,
            "made_by": self.made_by,
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        body = json.dumps(content).encode()
        return b'{"format": %d, "checksum": "%s", "content": %s}\n' % (FORMAT, checksum(body).encode(), body)


def write_manifest(folder: Folder, state: dict[str, Any], made_by: dict[str, Any] | None = None) -> Manifest:
    """Take the checksums of the files in `folder`, which are read for it, and write the manifest beside them."""
    files = {name: record_of(folder, name) for name in folder.sizes() if name.endswith(SUFFIX)}
    manifest = Manifest(state, files, made_by or {}, time.time())
    folder.write(MANIFEST, manifest.sealed())
    return manifest


def read_manifest(where: Path | str | Folder) -> Manifest:
    """The manifest of a checkpoint, after the cheap check: it is whole, and every file is there in its full size.

    Raises:
        DamagedError: the checkpoint is damaged (says which file), or of a later format.
        IncompleteError: it has no manifest.
        UnreadableError: the disk or the store does not give it.
    """
    folder = folder_at(where)
    try:
        sizes = patiently(folder.sizes)
        document = patiently(lambda: folder.read(MANIFEST)) if MANIFEST in sizes else None
    except GONE as error:
        raise DamagedError(f"{folder} cannot be read: {error.strerror or error}{REMEDY}") from None
    except OSError as error:
        raise UnreadableError(unreadable(folder, error)) from None
    if document is None:
        raise IncompleteError(f"{folder} is no complete checkpoint: {MANIFEST} is missing{REMEDY}")
    try:
        manifest = _parse(document)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{folder}/{MANIFEST} cannot be read: {error!r}{REMEDY}") from None
    if manifest.format > FORMAT:
        rule = f"\n  rule:   this version reads formats 1 to {FORMAT}\n  remedy: resume with the version that wrote it"
        raise DamagedError(f"{folder}/{MANIFEST} has format {manifest.format}{rule}")
    _check(folder, manifest, sizes)
    return manifest


def _parse(document: bytes) -> Manifest:
    if (sealed := _SEALED.fullmatch(document)) is None:
        return _parse_unsealed(json.loads(document))
    version, said, body = int(sealed[1]), sealed[2].decode(), sealed[3]
    if version > FORMAT:
        return Manifest({}, {}, format=version)
    if version != FORMAT or checksum(body) != said:
        raise ValueError("its own checksum differs")
    content = json.loads(body)
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(dict(content["state"]), files, dict(content["made_by"]), float(content["saved_at_s"]))


def _parse_unsealed(document: Any) -> Manifest:
    """Format 1; of a later one only the number is sure."""
    version = int(document["format"])
    if version > FORMAT:
        return Manifest({}, {}, format=version)
    if version != 1:
        raise ValueError("it is not as it was written")
    files = {name: FileRecord(int(size)) for name, size in dict(document["file_bytes"]).items()}
    return Manifest(dict(document["state"]), files, format=1)


def _check(folder: Folder, manifest: Manifest, sizes: dict[str, int]) -> None:
    for name, record in manifest.files.items():
        if (found := sizes.get(name)) != record.nbytes:
            shown = "is missing" if found is None else f"holds {found} bytes"
            raise DamagedError(f"{folder}/{name} {shown}, but {record.nbytes} bytes were written{REMEDY}")
    if spare := [name for name in sizes if name.endswith(SUFFIX) and name not in manifest.files]:
        raise DamagedError(f"{folder}/{spare[0]} is no part of the checkpoint that {MANIFEST} tells of{REMEDY}")
    named, step = STEP_FOLDER.fullmatch(folder.name), manifest.state.get("step")
    if named and step is not None and int(named[1]) != step:
        raise DamagedError(f"{folder}/{MANIFEST} is of step {step}, and does not belong into {folder.name}{REMEDY}")
