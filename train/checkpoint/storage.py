"""Tensors to and from a folder through torch.distributed.checkpoint over safetensors: no pickle is read or written.

Every rank writes the shards it owns; a file's header says where each shard lies in the whole tensor.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from octofold.backends.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and the names of tensors; a reader refuses any other."""
REMEDY = "\n  remedy: resume from an earlier checkpoint of the run"


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Collective: write `tensors` (DTensors, or tensors that are equal on every rank) into `folder`."""
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor], *, whole: bool = True) -> None:
    """Collective: fill `tensors`, on any layout, in place from what `write_tensors` wrote.

    Args:
        whole: also refuse a checkpoint that holds tensors not asked for.

    Raises:
        UserError: a file is damaged, or names or shapes differ from the checkpoint's.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {error}{REMEDY}") from None
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    faults = [f"{name}: not in the checkpoint" for name in tensors if name not in saved]
    if whole:
        faults += [f"{name}: in the checkpoint only" for name in saved if name not in tensors]
    for name in sorted(saved.keys() & tensors.keys()):
        entry = saved[name]
        assert isinstance(entry, TensorStorageMetadata)  # nothing else is written
        shape = tuple(entry.size)
        if shape != tuple(tensors[name].shape):
            faults.append(f"{name}: {list(shape)} in the checkpoint, {list(tensors[name].shape)} in the model")
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(
            f"{folder} does not fit the configured model:\n  "
            + "\n  ".join(faults[:10])
            + more
            + "\n  remedy: resume with the model the checkpoint was made with"
        )
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


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
