"""The global norm of gradients whose parameters live on different meshes (torch's own refuses those)."""

from collections.abc import Iterable
from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate

from octofold.backends.collectives import all_reduce_sum


def copies_in_world(gradient: DTensor) -> int:
    """How many ranks of the world hold each element: a parameter's mesh spans the whole stage that has it."""
    mesh = gradient.device_mesh
    return prod(mesh.size(axis) for axis, kind in enumerate(gradient.placements) if isinstance(kind, Replicate))


def global_norm(gradients: Iterable[torch.Tensor], squares: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Euclidean norm over all elements of all gradients, each counted once: scalar FP64, equal on every rank.

    Args:
        gradients: DTensors, on any meshes whose ranks belong to the default process group.
        squares: gets this rank's part of the square of each gradient's norm, scalar FP64.
    """
    total = None
    for gradient in gradients:
        assert isinstance(gradient, DTensor)
        shard = gradient.to_local()
        square = torch.linalg.vector_norm(shard, dtype=torch.float64).square() / copies_in_world(gradient)
        if squares is not None:
            squares.append(square)
        total = square if total is None else total + square
    assert total is not None, "no parameter has a gradient"
    return all_reduce_sum(total).sqrt()
