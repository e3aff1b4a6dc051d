"""Tensors to and from a folder through torch.distributed.checkpoint over safetensors: no pickle is read or written.

Every rank writes the shards it owns; a file's header says where each shard lies in the whole tensor.
"""

from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from octofold.backends.errors import UserError
from octofold.train.checkpoint.manifest import REMEDY
from octofold.train.checkpoint.quantized import SCALE_SUFFIX, dequantize_window
from octofold.train.checkpoint.reading import CheckpointReader


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Collective: write `tensors` (DTensors, or tensors that are equal on every rank) into `folder`."""
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


OPTIONAL = "precision."
"""State of an FP8 recipe: a run may go on under another one, which has none or begins it afresh."""


def read_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], *, whole: bool = True, block: int | None = None
) -> None:
    """Collective: fill `tensors`, on any layout and in their own dtype, in place from a checkpoint.

    Ranks may ask for different tensors (the stages of a pipeline do); a fault of one is told to all.

    Those whose names begin with `OPTIONAL` stay as they are where the checkpoint lacks them.

    Args:
        whole: also refuse a checkpoint that holds tensors not asked for.
        block: edge of the blocks of weights that the checkpoint holds in FP8.

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
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved or not name.startswith(OPTIONAL)}
    wanted = dict.fromkeys(name for names in _of_all_ranks(list(tensors)) for name in names)
    faults = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    if whole:
        spare = [name for name in saved if name.removesuffix(SCALE_SUFFIX) not in wanted]
        faults += [f"{name}: in the checkpoint only" for name in spare if not name.startswith(OPTIONAL)]
    for name in sorted(saved.keys() & tensors.keys()):
        entry = saved[name]
        assert isinstance(entry, TensorStorageMetadata)  # nothing else is written
        shape = tuple(entry.size)
        if shape != tuple(tensors[name].shape):
            key = " (precision.amax_history)" if name.startswith(OPTIONAL) else ""
            faults.append(f"{name}: {list(shape)} in the checkpoint, {list(tensors[name].shape)} in the model{key}")
    faults = list(dict.fromkeys(fault for told in _of_all_ranks(faults) for fault in told))
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(
            f"{folder} does not fit the configured model:\n  "
            + "\n  ".join(faults[:10])
            + more
            + "\n  remedy: resume with the model the checkpoint was made with"
        )
    quantised = {
        name: tensor
        for name, tensor in tensors.items()
        if saved[name].properties.dtype == torch.float8_e4m3fn  # type: ignore[union-attr]
    }
    plain = {name: tensor for name, tensor in tensors.items() if name not in quantised}
    dcp.load(plain, storage_reader=HuggingFaceStorageReader(str(folder)))
    if quantised:
        assert block is not None, "the manifest of a checkpoint with FP8 weights says their block"
        _read_quantised(folder, quantised, block)


def _of_all_ranks(texts: list[str]) -> list[list[str]]:
    """What each rank says."""
    told: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(told, texts)
    return told


@torch.no_grad()
def _read_quantised(folder: Path, tensors: dict[str, torch.Tensor], block: int) -> None:
    """Fill each tensor's shard with dequantised values, one matrix at a time."""
    reader = CheckpointReader(folder)
    for name, tensor in tensors.items():
        shape, offset, local = tuple(tensor.shape), (0,) * tensor.ndim, tensor
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
        if local.numel() == 0:
            continue
        *leading, first_row, first_column = offset
        window = {"block": block, "first_row": first_row, "first_column": first_column}
        scale_rows = reader.tensors[name + SCALE_SUFFIX][1][-2]
        rows, columns = slice(first_row, first_row + shape[-2]), slice(first_column, first_column + shape[-1])
        for inside in product(*map(range, shape[:-2])):
            place = tuple(start + index for start, index in zip(leading, inside, strict=True))
            data = reader.read_rows(name, rows.start, rows.stop, place=place)[:, columns]
            scale = reader.read_rows(name + SCALE_SUFFIX, 0, scale_rows, place=place)
            local[inside].copy_(dequantize_window(data, scale, **window))
