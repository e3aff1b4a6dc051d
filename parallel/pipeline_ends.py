"""A parameter that the first and the last stage of a pipeline both hold: one of the model's, with two shards' places.

The embedding, where multi-token prediction or a tied head needs it at the end. Each stage differentiates its own copy;
both receive the sum, so that equal copies stay equal. It counts once in the global norm and is saved once, by the first
stage.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends.collectives import Group


class SharedEnds:
    """This rank's shards of the parameter: none, the original, the copy, or both (in a V the ends share a rank)."""

    def __init__(self, original: nn.Parameter | None, copied: nn.Parameter | None, group: Group, last: int) -> None:
        """
        Args:
            group: the ranks of the pipeline, of which the first holds the original.
            last: number in the group of the rank that holds the copy.
        """
        self.original, self.copied, self.group = original, copied, group
        self._peer = last if group.rank() == 0 else 0

    def sum_gradients(self) -> None:
        """Add up both gradients. Collective over the two ranks."""
        held = [parameter.grad for parameter in (self.original, self.copied) if parameter is not None]
        gradients = [_shard(gradient) for gradient in held if gradient is not None]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:
            other = torch.empty_like(gradients[0])
            operations = [
                dist.P2POp(dist.isend, gradients[0].clone(), group=self.group, group_peer=self._peer),
                dist.P2POp(dist.irecv, other, group=self.group, group_peer=self._peer),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            gradients[0].add_(other)

    @torch.no_grad()
    def follow(self, originals: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
        """Make the copy, or what belongs to it, equal to the original. Collective over the two ranks.

        Args:
            originals, copies: of the original and of the copy, in the same order; empty where it is not here.
        """
        if originals and copies:
            for original, copied in zip(originals, copies, strict=True):
                _shard(copied).copy_(_shard(original))
        for tensor in originals if not copies else []:
            dist.send(_shard(tensor).contiguous(), group=self.group, group_dst=self._peer)
        for tensor in copies if not originals else []:
            received = torch.empty_like(_shard(tensor))
            dist.recv(received, group=self.group, group_src=self._peer)
            _shard(tensor).copy_(received)


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
