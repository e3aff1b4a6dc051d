"""Tensors from a checkpoint into a model on any layout, through torch.distributed.checkpoint: no pickle is read.

Each rank reads the windows that its shards need, a few megabytes at a time. What no rank needed is read too, for its
checksum's sake, so that a checkpoint of which one byte is wrong is never taken for a whole one.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from octofold.backends.collectives import Group
from octofold.backends.errors import UserError
from octofold.train.checkpoint.checksums import DamagedError, UnreadableError
from octofold.train.checkpoint.folders import Folder, folder_at
from octofold.train.checkpoint.manifest import Manifest, read_manifest
from octofold.train.checkpoint.quantized import SCALE_SUFFIX, dequantize_window
from octofold.train.checkpoint.reading import CheckpointReader

T = TypeVar("T")

OPTIONAL = "precision."
"""State of an FP8 recipe: a run may go on under another one, which has none or begins it afresh."""


def read_tensors(
    where: Path | str | Folder,
    tensors: dict[str, torch.Tensor],
    *,
    whole: bool = True,
    manifest: Manifest | None = None,
    group: Group | None = None,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Collective: fill `tensors`, on any layout and in their own dtype, in place from a checkpoint.

    Ranks may ask for different tensors (the stages of a pipeline do); a fault of one is told to all, and raised by all.

    Those whose names begin with `OPTIONAL` stay as they are where the checkpoint lacks them.

    Args:
        whole: also refuse a checkpoint that holds tensors not asked for, and check what no rank needed.
        manifest: of the checkpoint, if it has been read.
        group: of all ranks, to agree over; None: the default one.
        alive: called after each piece that is read.

    Raises:
        DamagedError: a file is not what was written; some tensors may have been filled.
        UserError: names or shapes differ from the checkpoint's.
    """
    ranks = Ranks(group)
    folder = folder_at(where)
    with ExitStack() as opened:
        # Each rank reads the headers of a share of the files.
        reader = ranks.together(
            lambda: CheckpointReader(
                folder, manifest or read_manifest(folder), share=(ranks.rank, ranks.size), alive=alive
            )
        )
        opened.callback(reader.close)
        found = ranks.gather(reader.found)
        ranks.together(lambda: reader.join(found))
        tensors = {name: x for name, x in tensors.items() if name in reader.saved or not name.startswith(OPTIONAL)}
        _check_fit(reader, tensors, ranks, whole=whole)
        quantised = {n: x for n, x in tensors.items() if reader.saved[n].dtype == torch.float8_e4m3fn}
        _read_plain(reader, {name: x for name, x in tensors.items() if name not in quantised}, group)
        ranks.together(lambda: _read_quantised(reader, quantised))
        if whole:
            checked = ranks.gather({name: file.checked for name, file in reader.files.items()})
            ranks.together(lambda: _check_rest(reader, checked, ranks))


class Ranks:
    """What ranks tell one another while they read."""

    def __init__(self, group: Group | None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, own: T) -> list[T]:
        """What each rank gives."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, own, group=self.group)
        return told

    def first(self, action: Callable[[], T]) -> T:
        """The action's result on the first rank, for all; raises as `together`."""
        told = [self.together(lambda: action() if self.rank == 0 else None)]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """The action's result on this rank, if it succeeded on every rank.

        Raises:
            UnreadableError, DamagedError, UserError: as the first rank on which it failed.
        """
        result, failure = None, None
        try:
            result = action()
        except (UserError, OSError) as error:
            kinds = (UnreadableError, DamagedError, UserError)
            kind = next((k for k in kinds if isinstance(error, k)), UnreadableError)
            failure = (kind, str(error))
        for told in self.gather(failure):
            if told is not None:
                raise told[0](told[1])
        return result  # type: ignore[return-value]


def _check_fit(reader: CheckpointReader, tensors: dict[str, torch.Tensor], ranks: Ranks, *, whole: bool) -> None:
    """Collective: refuse a checkpoint of another model."""
    saved = reader.saved
    wanted = dict.fromkeys(name for names in ranks.gather(list(tensors)) for name in names)
    faults = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    if whole:
        spare = [name for name in saved if name.removesuffix(SCALE_SUFFIX) not in wanted]
        faults += [f"{name}: in the checkpoint only" for name in spare if not name.startswith(OPTIONAL)]
    for name in sorted(saved.keys() & tensors.keys()):
        shape = saved[name].shape
        if shape != tuple(tensors[name].shape):
            key = " (precision.amax_history)" if name.startswith(OPTIONAL) else ""
            faults.append(f"{name}: {list(shape)} in the checkpoint, {list(tensors[name].shape)} in the model{key}")
    faults = list(dict.fromkeys(fault for told in ranks.gather(faults) for fault in told))
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(
            f"{reader.folder} does not fit the configured model:\n  "
            + "\n  ".join(faults[:10])
            + more
            + "\n  remedy: resume with the model the checkpoint was made with"
        )


def _read_plain(reader: CheckpointReader, tensors: dict[str, torch.Tensor], group: Group | None) -> None:
    """Collective: fill tensors that are saved as they are."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(tensors), storage_reader=_DcpReader(reader), planner=planner, process_group=group)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, DamagedError):
            raise failure from None
        raise


class _DcpReader(StorageReader):
    """What torch.distributed.checkpoint is given to read with: it plans, from the shards that there are."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def reset(self, checkpoint_id: Any = None) -> None:
        """See `StorageReader`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Of the tensors, what shards there are of each."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(shard.offset), torch.Size(shard.stored.shape))
                        for shard in tensor.shards
                    ],
                )
                for name, tensor in self._reader.saved.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See `StorageReader`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned windows, file by file in the order of their bytes."""
        requests = []
        for item in plan.items:
            # torch says which of the chunks that `read_metadata` named.
            assert item.storage_index.index is not None
            shard = self._reader.saved[item.storage_index.fqn].shards[item.storage_index.index]
            requests.append((shard.file, shard.stored.begin, shard, item))
        for _, _, shard, item in sorted(requests, key=lambda request: request[:2]):
            target = planner.resolve_tensor(item).detach()
            self._reader.read_shard(shard, list(item.storage_offsets), target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """See `StorageReader`."""
        return True


@torch.no_grad()
def _read_quantised(reader: CheckpointReader, tensors: dict[str, torch.Tensor]) -> None:
    """Fill each tensor's shard with dequantised values, one matrix at a time."""
    for name, tensor in tensors.items():
        block = reader.state.get("block")
        assert block is not None, "the manifest of a checkpoint with FP8 weights says their block"
        shape, offset, local = tuple(tensor.shape), (0,) * tensor.ndim, tensor
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
        if local.numel() == 0:
            continue
        *leading, first_row, first_column = offset
        ones = (1,) * len(leading)
        scales = reader.saved[name + SCALE_SUFFIX].shape[-2:]
        for inside in product(*map(range, shape[:-2])):
            place = tuple(start + index for start, index in zip(leading, inside, strict=True))
            data = reader.read(name, (*place, first_row, first_column), (*ones, *shape[-2:]))
            scale = reader.read(name + SCALE_SUFFIX, (*place, 0, 0), (*ones, *scales))
            numbers = dequantize_window(data, scale, block=block, first_row=first_row, first_column=first_column)
            local[inside].copy_(numbers.view(shape[-2:]))


def _check_rest(reader: CheckpointReader, checked: list[dict[str, set[int]]], ranks: Ranks) -> None:
    """Read this rank's share of the blocks that no rank has read."""
    rest = []
    for name, record in reader.manifest.files.items():
        known = set().union(*(of_rank.get(name, ()) for of_rank in checked))
        blocks = range(record.count) if record.blocks is not None else ()
        rest += [(name, number) for number in blocks if number not in known]
    begin, end = (len(rest) * place // ranks.size for place in (ranks.rank, ranks.rank + 1))
    for name, number in rest[begin:end]:
        reader.file(name).check(number)
