"""Windows of the tensors in a checkpoint, assembled from the files of all ranks that wrote it, without reading more."""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from octofold.backends.errors import UserError
from octofold.train.checkpoint.manifest import REMEDY, read_manifest
from octofold.train.checkpoint.safetensors_files import StoredTensor, read_header, read_rows

SHARDING = "DCP_SHARDING_INFO"
"""Where torch's writer keeps the place of each shard in its whole (torch/distributed/checkpoint/hf_storage.py)."""


@dataclass(frozen=True)
class _Shard:
    stored: StoredTensor
    offset: tuple[int, ...]


class CheckpointReader:
    """A complete checkpoint of a run."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: a file is missing, cut short or damaged, or a tensor lacks a part.
        """
        self.folder = folder
        self.state = read_manifest(folder)
        self._shards: dict[str, list[_Shard]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            stored, metadata = read_header(path)
            places = json.loads(metadata.get(SHARDING, "{}"))
            for name, tensor in stored.items():
                offset = places[name]["saved_offsets"] if name in places else [0] * len(tensor.shape)
                self._shards.setdefault(name, []).append(_Shard(tensor, tuple(offset)))
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (shards[0].stored.dtype, self._shape(name, shards)) for name, shards in self._shards.items()
        }
        """Dtype and whole shape by name."""

    def _shape(self, name: str, shards: list[_Shard]) -> tuple[int, ...]:
        ends = [[o + s for o, s in zip(shard.offset, shard.stored.shape, strict=True)] for shard in shards]
        shape = tuple(max(end) for end in zip(*ends, strict=True))
        if sum(prod(shard.stored.shape) for shard in shards) != prod(shape):
            raise UserError(f"{self.folder}: the parts of {name} do not make up a tensor {list(shape)}{REMEDY}")
        return shape

    def read_rows(self, name: str, first: int, last: int, *, place: tuple[int, ...] = ()) -> torch.Tensor:
        """tensor[place][first:last] of the whole tensor; `place`: which matrix of a stack."""
        dtype, shape = self.tensors[name]
        rows = len(place)
        window = torch.empty((last - first, *shape[rows + 1 :]), dtype=dtype)
        for shard in self._shards[name]:
            begin, size = shard.offset[rows], shard.stored.shape[rows]
            low, high = max(first, begin), min(last, begin + size)
            if low >= high:
                continue
            inside = [index - start for index, start in zip(place, shard.offset, strict=False)]
            if not all(0 <= index < held for index, held in zip(inside, shard.stored.shape, strict=False)):
                continue
            # Seen as one matrix below the other, a matrix's rows lie together.
            skipped = 0
            for index, held in zip(inside, shard.stored.shape, strict=False):
                skipped = skipped * held + index
            skipped *= size
            part = read_rows(_flat(shard.stored, rows), skipped + low - begin, skipped + high - begin)
            if part.shape == window.shape:
                return part
            inner = zip(shard.offset[rows + 1 :], part.shape[1:], strict=True)
            columns = tuple(slice(o, o + s) for o, s in inner)
            # Copied as bytes: not every dtype here has every op.
            _as_bytes(window)[(slice(low - first, high - first), *columns)] = _as_bytes(part)
        return window


def _flat(stored: StoredTensor, leading: int) -> StoredTensor:
    """The same numbers with the first `leading` + 1 dims as one."""
    return replace(stored, shape=(prod(stored.shape[: leading + 1]), *stored.shape[leading + 1 :]))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same places with integers of the same width."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
