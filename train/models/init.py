"""Initial weights that do not depend on the layout: each matrix, and each expert's matrix, from a seed of its own.

The seed of a tensor is a hash of (run seed, parameter name, expert); a rank makes the whole matrix and keeps its part.
"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _local_window(parameter: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's part and its offset in the whole."""
    if isinstance(parameter, DTensor):
        return compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(parameter.shape), (0,) * parameter.ndim


def _matrix(shape: torch.Size, std: float, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    # Drawn in FP32 whatever the master dtype, so that an FP64 run starts from the weights of the FP32 run.
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator).to(dtype)


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int, std: float, stacked: tuple[str, ...]) -> None:
    """Fill every parameter (on its device, DTensor or not): norms with 1, matrices from N(0, std²).

    Args:
        stacked: names of modules whose parameters are [E, …], one matrix an expert; bounds memory to one matrix.
    """
    for name, parameter in model.named_parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            part.fill_(1.0)
            continue
        shape, offset = _local_window(parameter)
        window = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        if part.numel() == 0:
            continue
        if name.rpartition(".")[0] in stacked:
            for row, expert in enumerate(range(offset[0], offset[0] + shape[0])):
                whole = _matrix(parameter.shape[1:], std, _generator(seed, name, expert), parameter.dtype)
                part[row].copy_(whole[window[1:]])
        else:
            part.copy_(_matrix(parameter.shape, std, _generator(seed, name, None), parameter.dtype)[window])
