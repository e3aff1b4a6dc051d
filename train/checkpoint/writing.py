"""What torch.distributed.checkpoint is given to write a checkpoint with: tensors copied to host memory, and files.

torch gathers the plans of all ranks, leaves every replica to one rank, the one with least to write so far, and tells
all of them when one fails. Each rank writes one safetensors file; a shard's place in the whole stands in its header.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import chain
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from octofold.train.checkpoint.checksums import BLOCK_BYTES, BlockSums, DamagedError, FileRecord
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.manifest import MANIFEST, SUFFIX, Manifest, read_manifest
from octofold.train.checkpoint.safetensors_files import METADATA, NAMES

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where torch's reader looks for the place of each shard in its whole (torch/distributed/checkpoint/hf_storage.py)."""


_LEFT = re.compile(r"\.(step_\d+)\.(?:partial|removed)")
"""On a disk, what a save or a removal that was cut short leaves behind."""


class HostCopies:
    """Host memory that tensors are copied into, kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._later: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor], *, later: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Copies of this rank's shards by name, complete on return but for those that `finish` makes.

        Args:
            later: names of tensors that stay as they are until `finish` has returned; heeded for those in host memory.
        """
        shards = {name: shard_of(tensor) for name, tensor in tensors.items()}
        self._later.clear()
        for name in self._kept.keys() - shards.keys():
            del self._kept[name]
        devices = set()
        for name, shard in shards.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != shard.shape or kept.dtype != shard.dtype:
                pinned = shard.device.type != "cpu"
                kept = torch.empty(shard.shape, dtype=shard.dtype, device="cpu", pin_memory=pinned)
                self._kept[name] = kept
            if shard.device.type == "cpu" and name in later:
                self._later[name] = shard
                continue
            kept.copy_(shard, non_blocking=True)
            devices.add(shard.device)
        for device in devices:
            if device.type != "cpu":
                torch.get_device_module(device).synchronize(device)
        return dict(self._kept)

    def finish(self) -> None:
        """Make the copies that were put off; from any thread."""
        while self._later:
            name, shard = self._later.popitem()
            self._kept[name].copy_(shard)


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class ShardPlanner(DefaultSavePlanner):
    """Plans from tensors at once, and needs of them later only the shards that it is given."""

    def __init__(self, tensors: dict[str, torch.Tensor], shards: dict[str, torch.Tensor]) -> None:
        """
        Args:
            tensors: DTensors, or tensors that are equal on every rank; they are not kept.
            shards: of the same names, in host memory.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        items = create_default_local_save_plan(dict(tensors), is_coordinator=False).items
        self._local = SavePlan([item for item in items if _numel(item)])
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        """See `SavePlanner`."""
        return self._local

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """See `SavePlanner`."""
        return self._shards[write_item.index.fqn]


def _numel(item: WriteItem) -> int:
    """Numbers of a shard; a rank may have none of a tensor. An empty tensor counts, or it would be lost."""
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) if prod(item.tensor_data.size) else 1


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint, each rank its file; the first rank begins and publishes it."""

    def __init__(
        self,
        checkpoints: Folder,
        name: str,
        state: dict[str, Any],
        made_by: dict[str, Any],
        warn: Callable[[str], None],
        alive: Callable[[], None],
    ) -> None:
        """`alive`: called after each piece that is written."""
        self._warn, self._alive = warn, alive
        self.writing = False
        """Whether this rank's own part is under way."""
        self._checkpoints, self._name, self._state, self._made_by = checkpoints, name, state, made_by
        self.manifest: Manifest | None = None
        """On the first rank, once published."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """See `StorageWriter`."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank: make the folder, and name the ranks' files."""
        try:
            self._recover()
            self._checkpoints.sweep()
        except OSError as error:
            self._warn(f"{self._checkpoints}: what earlier saves left behind could not be removed: {error}")
        self._checkpoints.begin(self._name, MANIFEST)
        names = [f"shard-{rank:05}-of-{len(plans):05}{SUFFIX}" for rank in range(1, len(plans) + 1)]
        return [SavePlan(plan.items, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def _recover(self) -> None:
        """Give a checkpoint its name back that is complete and lost it in a crash between two renames."""
        names = set(self._checkpoints.folders())
        # What was published before what was about to replace it.
        for left in sorted(names, key=lambda name: name.endswith(".partial")):
            match = _LEFT.fullmatch(left)
            if match is None or match[1] in names:
                continue
            with suppress(DamagedError):
                state = read_manifest(self._checkpoints / left).state
                if f"step_{state.get('step')}" == match[1]:
                    self._checkpoints.set_aside(left, match[1], MANIFEST)
                    names.add(match[1])

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, unless it has nothing to write."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        name = plan.storage_data
        folder = self._checkpoints.partial(self._name)
        folder.make()
        shards = [(item, planner.resolve_data(item)) for item in plan.items]
        self.writing = True
        try:
            record = write_shards(folder, name, shards, self._alive)
        finally:
            self.writing = False
        done.set_result([WriteResult(MetadataIndex(name), record.nbytes, record)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: the manifest, then the name by which it counts."""
        files = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}
        folder = self._checkpoints.partial(self._name)
        seen = folder.sizes()
        if unseen := [name for name, record in files.items() if seen.get(name) != record.nbytes]:
            raise OSError(f"rank 0 does not see {folder}/{unseen[0]} in full: checkpoint.dir must be one for all ranks")
        manifest = Manifest(self._state, files, self._made_by, time.time())
        folder.write(MANIFEST, manifest.sealed())
        self._checkpoints.publish(self._name)
        self.manifest = manifest

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """See `StorageWriter`."""
        return True

    def storage_meta(self) -> StorageMeta | None:
        """See `StorageWriter`."""
        return None


def write_shards(
    folder: Folder, name: str, shards: Sequence[tuple[WriteItem, torch.Tensor | Any]], alive: Callable[[], None]
) -> FileRecord:
    """One file of shards, durable on return.

    Args:
        shards: what torch planned of each, and its numbers.
        alive: called after each piece.
    """
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    end = 0
    for item, tensor in shards:
        assert item.tensor_data is not None
        assert item.index.fqn not in header, item
        size = tensor.numel() * tensor.element_size()
        header[item.index.fqn] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        places[item.index.fqn] = {OFFSETS: list(item.tensor_data.chunk.offsets)}
        end += size
    document = json.dumps({METADATA: {"format": "pt", SHARDING: json.dumps(places)}, **header}).encode()
    document += b" " * (-len(document) % 8)
    document = len(document).to_bytes(8, "little") + document
    sums = BlockSums(len(document))
    with folder.writing(name) as file:
        for data in chain([document], (bytes_of(tensor) for _, tensor in shards)):
            view = memoryview(data)  # type: ignore[arg-type]
            for begin in range(0, len(view), BLOCK_BYTES):
                piece = view[begin : begin + BLOCK_BYTES]
                sums.update(piece)
                file.write(piece)
                alive()
    return sums.record()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies in host memory one number after the other."""
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view
