"""Linear maps of rows between ranks, in two halves: what a rank computes between them overlaps with the exchange.

The gradient travels by the map's transpose, also in two halves: it departs where the rows arrived, and is waited for
where they departed. What was computed between the halves in the forward pass has its backward pass between them, since
autograd runs the newest operation first. No parameter takes part (parallel/pipeline splits the backward pass by those).
"""

from typing import Any, Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Passage(Protocol):
    """A linear map from rows on this rank to rows on others. Collective: every rank of the group takes part."""

    def begin(self, tensors: Tensors) -> Any:
        """Start to send; returns what `end` needs."""

    def end(self, pending: Any) -> Tensors:
        """Wait for what was sent to this rank."""


class Trip:
    """One use of a passage and, in the backward pass, of its transpose."""

    def __init__(self, there: Passage, back: Passage) -> None:
        self.there, self.back = there, back
        self._pending: Any = None

    def depart(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Start; returns a ticket for `arrive`. Differentiable in every tensor."""
        ticket: torch.Tensor = _Depart.apply(self, *tensors)
        return ticket

    def arrive(self, ticket: torch.Tensor) -> Tensors:
        """What arrives here."""
        arrived: Tensors = _Arrive.apply(self, ticket)
        return arrived

    def hold(self, pending: Any) -> None:
        """Keep what is on its way."""
        self._pending = pending

    def take(self) -> Any:
        """What is on its way, once."""
        pending, self._pending = self._pending, None
        assert pending is not None, "nothing has departed"
        return pending


def travel(there: Passage, back: Passage, *tensors: torch.Tensor) -> Tensors:
    """Both halves at once."""
    trip = Trip(there, back)
    return trip.arrive(trip.depart(*tensors))


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip, *tensors):
        ctx.trip = trip
        trip.hold(trip.there.begin(tensors))
        # The ticket stands in the graph for rows that are still on their way.
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.trip.back.end(ctx.trip.take())


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip, ticket):
        ctx.trip = trip
        return trip.there.end(trip.take())

    @staticmethod
    def backward(ctx, *grads):
        ctx.trip.hold(ctx.trip.back.begin(grads))
        return None, torch.zeros((), device=grads[0].device)
