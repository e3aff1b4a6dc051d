"""Windows of the tensors in a checkpoint, assembled from the files of all ranks that wrote it, without reading more.

Every byte that is read is held to its checksum on the way.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from octofold.train.checkpoint.checksums import REMEDY, CheckedFile, DamagedError
from octofold.train.checkpoint.folders import Folder, folder_at
from octofold.train.checkpoint.manifest import Manifest, read_manifest
from octofold.train.checkpoint.safetensors_files import StoredTensor, parse_header
from octofold.train.checkpoint.windows import first_number, is_run, pieces
from octofold.train.checkpoint.writing import OFFSETS, SHARDING


@dataclass(frozen=True)
class Shard:
    """A part of a tensor, in a file."""

    stored: StoredTensor
    file: str
    offset: tuple[int, ...]
    """Of its first number in the whole."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole."""
    shards: list[Shard]


class CheckpointReader:
    """A checkpoint of a run, open for reading. A context, or closed with the process."""

    def __init__(
        self,
        folder: Path | str | Folder,
        manifest: Manifest | None = None,
        *,
        share: tuple[int, int] = (0, 1),
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            manifest: of the checkpoint, if it has been read.
            share: this rank's number and how many there are, where several read headers of different files; then they
                exchange what they `found`, and `join` it.
            alive: called after each piece that is read.

        Raises:
            DamagedError: a file is missing, cut short or damaged, or a tensor lacks a part.
        """
        self.folder = folder_at(folder)
        self.manifest = manifest or read_manifest(self.folder)
        self.state: dict[str, Any] = self.manifest.state
        self._opened, self._alive = ExitStack(), alive
        self.files: dict[str, CheckedFile] = {}
        """Those read so far."""
        mine = list(self.manifest.files)[share[0] :: share[1]]
        self.found = [shard for name in mine for shard in self._shards(name)]
        """In the headers that were read here."""
        self.saved: dict[str, SavedTensor] = {}
        """By name, once joined."""
        if share[1] == 1:
            self.join([self.found])

    def join(self, found: list[list[Shard]]) -> None:
        """Put the shards of all files together.

        Raises:
            DamagedError: a tensor lacks a part.
        """
        parts: dict[str, list[Shard]] = {}
        for shard in (shard for shards in found for shard in shards):
            parts.setdefault(shard.stored.name, []).append(shard)
        for name, shards in sorted(parts.items()):
            ends = [[o + s for o, s in zip(shard.offset, shard.stored.shape, strict=True)] for shard in shards]
            shape = tuple(max(end) for end in zip(*ends, strict=True))
            if sum(prod(shard.stored.shape) for shard in shards) != prod(shape):
                rule = f"the parts of {name} do not make up a tensor {list(shape)}"
                raise DamagedError(f"{self.folder}: {rule}{REMEDY}")
            self.saved[name] = SavedTensor(shards[0].stored.dtype, shape, shards)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and whole shape by name."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.saved.items()}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._opened.close()
        self.files = {}

    def file(self, name: str) -> CheckedFile:
        """A file, opened when it is first read."""
        if name not in self.files:
            file = CheckedFile(self.folder, name, self.manifest.files[name], self._alive)
            self.files[name] = self._opened.enter_context(file)
        return self.files[name]

    def _shards(self, name: str) -> list[Shard]:
        file = self.file(name)
        stored, metadata = parse_header(Path(f"{self.folder}/{name}"), file.record.nbytes, file.read)
        places = json.loads(metadata.get(SHARDING, "{}"))
        return [
            Shard(tensor, name, tuple(places[key][OFFSETS] if key in places else [0] * len(tensor.shape)))
            for key, tensor in stored.items()
        ]

    def read(self, name: str, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
        """The window [offsets, offsets + lengths) of a tensor, in memory of its own."""
        window = torch.empty(lengths, dtype=self.saved[name].dtype)
        self.read_into(name, offsets, window)
        return window

    def read_rows(self, name: str, first: int, last: int, *, place: tuple[int, ...] = ()) -> torch.Tensor:
        """tensor[place][first:last] of the whole tensor; `place`: which matrix of a stack."""
        inner = self.saved[name].shape[len(place) + 1 :]
        offsets = (*place, first, *([0] * len(inner)))
        return self.read(name, offsets, (*([1] * len(place)), last - first, *inner)).view(last - first, *inner)

    def read_into(self, name: str, offsets: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out`, of any device and dtype, with the window of its shape at `offsets`."""
        for shard in self.saved[name].shards:
            low = [max(a, b) for a, b in zip(offsets, shard.offset, strict=True)]
            ends = zip(offsets, out.shape, shard.offset, shard.stored.shape, strict=True)
            high = [min(o + n, p + m) for o, n, p, m in ends]
            if any(end <= begin for begin, end in zip(low, high, strict=True)):
                continue
            inside = [begin - p for begin, p in zip(low, shard.offset, strict=True)]
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))]
            self.read_shard(shard, inside, target)

    def read_shard(self, shard: Shard, offsets: list[int] | torch.Size, out: torch.Tensor) -> None:
        """Fill `out` with the window of its shape at `offsets` in a shard."""
        stored, file = shard.stored, self.file(shard.file)
        # A scalar is read as one number of a row.
        shape, offset, lengths = stored.shape or (1,), list(offsets) or [0], list(out.shape) or [1]
        out = out.view(lengths) if not out.shape else out
        width = stored.dtype.itemsize
        direct = out.device.type == "cpu" and out.dtype == stored.dtype and out.is_contiguous()
        if direct and is_run(shape, offset, lengths):
            if out.numel():
                view = out.reshape(-1).view(torch.uint8).numpy().data
                file.read_into(view, stored.begin + first_number(shape, offset) * width)
            return
        for piece in pieces(shape, offset, lengths, width):
            raw = torch.empty(prod(piece.shape) * width, dtype=torch.uint8)
            file.read_into(raw.numpy().data, stored.begin + piece.first * width)
            rows = raw.view(stored.dtype).view(piece.shape)
            _copy(out[piece.target], rows[piece.inside])


def _copy(out: torch.Tensor, numbers: torch.Tensor) -> None:
    if out.dtype == numbers.dtype and out.device.type == "cpu":
        # As bytes: not every dtype here has every op.
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
        out, numbers = out.view(width), numbers.view(width)
    out.copy_(numbers)
