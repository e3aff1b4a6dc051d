"""Sums over the bits of tensors: what tells whether two tensors are the same without sending them."""

import torch
from torch.distributed.tensor import DTensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element in bytes."""
CHUNK = 2**22
"""Elements summed at once: the weights and products are a few times as large as an element."""


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits of a tensor of any dtype (of the shard of a DTensor): int64 scalar on its device.

    Each element, as an integer, counts by an odd weight of its place, modulo 2^64: a change of a single element always
    shows, other changes but for one in 2^64.
    """
    shard = _shard(tensor)
    words = shard.contiguous().flatten().view(WORDS[shard.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), dtype=torch.int64, device=words.device)
        total += (part * (2 * places + 1)).sum()
    return total


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether every number of a floating tensor (of the shard of a DTensor) is finite: bool scalar on its device."""
    return torch.isfinite(_shard(tensor)).all()


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole
