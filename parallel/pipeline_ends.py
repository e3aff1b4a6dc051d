"""A parameter that the first and the last stage of a pipeline both hold: one of the model's, with two shards' places.

The embedding, where multi-token prediction or a tied head needs it at the end. Each stage differentiates its own copy;
both receive the sum, so that equal copies stay equal. It counts once in the global norm and is saved once, by the first
stage.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends.collectives import Group, send_and_receive


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
        """Add up both gradients; an end that has none adds zero, and gets the sum. Collective over the two ranks."""
        held = [_gradient(parameter) for parameter in (self.original, self.copied) if parameter is not None]
        if len(held) == 2:
            held[0].add_(held[1])
            held[1].copy_(held[0])
        elif held:
            other = torch.empty_like(held[0])
            send_and_receive([(held[0].clone(), self._peer)], [(other, self._peer)], self.group)
            held[0].add_(other)

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
            send_and_receive([(_shard(tensor).contiguous(), self._peer)], [], self.group)
        for tensor in copies if not originals else []:
            received = torch.empty_like(_shard(tensor))
            send_and_receive([], [(received, self._peer)], self.group)
            _shard(tensor).copy_(received)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's shard of it; zero where the backward pass has left none, since the other end waits for it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return _shard(parameter.grad)


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
