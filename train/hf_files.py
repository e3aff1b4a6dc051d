"""What import and export of Hugging Face checkpoints share: writing shards, room on the disk, and lists of faults."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from octofold.backends.errors import UserError
from octofold.train.checkpoint.safetensors_files import OutputTensor, write_file

SHOWN_FAULTS = 20
BAR_FROM_BYTES = 2**30


Slabs = Callable[[], Iterable[torch.Tensor]]


def refuse(where: object, faults: Iterable[str], *, rule: str, remedy: str) -> None:
    """Raise one `UserError` that lists all faults (the first twenty), if there is one."""
    listed = list(faults)
    if not listed:
        return
    more = [f"… and {len(listed) - SHOWN_FAULTS} more"] if len(listed) > SHOWN_FAULTS else []
    lines = "".join(f"\n  {fault}" for fault in [*listed[:SHOWN_FAULTS], *more])
    raise UserError(f"{where}: {len(listed)} fault(s){lines}\n  rule:   {rule}\n  remedy: {remedy}")


def finite(slab: torch.Tensor) -> bool:
    """Whether every number is one."""
    if slab.numel() == 0:
        return True
    if slab.dtype == torch.float8_e4m3fn:
        return int((slab.view(torch.uint8) & 0x7F).amax()) < 0x7F
    if slab.dtype == torch.float8_e8m0fnu:
        return int(slab.view(torch.uint8).amax()) < 0xFF
    # A sum is several times faster than a look at each, and passes on what is not finite; it may also overflow.
    return bool(torch.isfinite(slab.sum(dtype=torch.float32))) or bool(torch.isfinite(slab).all())


def write_shards(folder: Path, tensors: Sequence[OutputTensor], *, shard_bytes: int) -> dict[str, str]:
    """Write the tensors, in order, into files of about `shard_bytes`; returns tensor → file name.

    A scale stays in the file of its weight, whose slabs may fill it in.

    Raises:
        UserError: the disk has too little room; nothing has been written then.
        OSError: writing failed; what was written is left to the caller.
    """
    total_bytes = sum(tensor.nbytes for tensor in tensors)
    require_room(folder, total_bytes)
    shards = pack(tensors, shard_bytes)
    places: dict[str, str] = {}
    with _bar(total_bytes) as advance:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            watched = [replace(t, slabs=_watched(t.slabs, advance)) for t in shard]
            write_file(folder / name, watched, {"format": "pt"})
            places |= {tensor.name: name for tensor in shard}
    return places


def pack(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """Runs of tensors of about `shard_bytes`, at least one tensor each."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes and not tensor.name.endswith("_scale_inv"):
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raise `UserError` unless the disk of `folder` has that much room."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{folder}: {needed_bytes / 1e9:,.2f} GB are to be written, and {free_bytes / 1e9:,.2f} GB are free\n"
            "  rule:   everything is written before anything is published\n"
            "  remedy: free some room, or name a folder on another disk"
        )


def _watched(slabs: Slabs, advance: Callable[[int], None]) -> Slabs:
    def watched() -> Iterator[torch.Tensor]:
        for slab in slabs():
            yield slab
            advance(slab.nbytes)

    return watched


@contextmanager
def _bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for people who wait for a large checkpoint."""
    if total_bytes < BAR_FROM_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("writing", total=total_bytes)
        yield lambda done_bytes: progress.advance(task, done_bytes)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to fill; it takes that name at the end, or is removed on any failure.

    Raises:
        UserError: `folder` holds something already, or the disk cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is there already\n  rule:   nothing is overwritten\n  remedy: another folder, or remove that one"
        )
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unwritable(folder: Path, error: OSError) -> UserError:
    """What a disk that is full or refuses means to the user."""
    return UserError(
        f"{folder} could not be written: {error.strerror or error}\n"
        "  rule:   a checkpoint is published whole; nothing of this one was left behind\n"
        "  remedy: free room or mend permissions, then repeat the command"
    )
