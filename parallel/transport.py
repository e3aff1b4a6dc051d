"""Rows of tokens between ranks, as they are or in eight bits with scales: a format is a value here.

N rows here, M rows received, D width.
"""

from dataclasses import dataclass, field

import torch

from octofold.backends.collectives import Group, exchange_rows
from octofold.kernels.qtensor import Format, QTensor
from octofold.kernels.registry import Kernels


@dataclass(frozen=True)
class Transport:
    """What travels to the experts of other ranks; the way back is in the dtype of the model."""

    dispatch: Format | None = None
    """Of tokens; None: as they are. A tile is part of one row."""
    gradient: Format | None = None
    """Of gradients of the experts' outputs, which travel the same way."""


PURPOSES = ("dispatch", "combine", "dispatch_gradient", "combine_gradient")
"""Of what travels: tokens to experts and back; the gradient of the combination travels to the experts, too."""


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks since they were last taken."""

    sent_bytes: dict[str, int] = field(default_factory=dict)
    """By purpose, those of `PURPOSES` that occurred."""

    def add(self, purpose: str, row_bytes: int, send_counts: list[int], own: int) -> None:
        """Count rows that leave; those for this rank itself (number `own`) do not."""
        away = sum(send_counts) - send_counts[own]
        self.sent_bytes[purpose] = self.sent_bytes.get(purpose, 0) + row_bytes * away

    def take(self) -> dict[str, int]:
        """What was counted; the count begins again."""
        taken, self.sent_bytes = self.sent_bytes, {}
        return taken


@dataclass(frozen=True)
class Route:
    """Who gets how many rows. Reversed for the way back."""

    group: Group
    send_counts: list[int]
    """Rows meant for each rank."""
    receive_counts: list[int]
    """Rows expected from each rank."""

    @property
    def back(self) -> "Route":
        """The way back."""
        return Route(self.group, self.receive_counts, self.send_counts)


def exchange(
    rows_ND: torch.Tensor,
    route: Route,
    kernels: Kernels,
    traffic: Traffic,
    *,
    purpose: str,
    forward: Format | None = None,
    backward: Format | None = None,
) -> torch.Tensor:
    """Exchange uneven blocks of rows: [N, D] to [M, D] in the same dtype. The gradient travels the other way.

    Args:
        rows_ND: the blocks for ranks 0, 1, … one after the other; so they arrive too.
        purpose: what the bytes are counted as (`Traffic`).
        forward: sent so and dequantised on arrival; None: sent as they are.
        backward: the same for the gradient.
    """
    exchanged: torch.Tensor = _Exchange.apply(rows_ND, route, kernels, traffic, purpose, forward, backward)
    return exchanged


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, route, kernels, traffic, purpose, forward_format, backward_format):
        ctx.arguments = route.back, kernels, traffic, f"{purpose}_gradient", backward_format
        return _move(rows, route, kernels, traffic, purpose, forward_format)

    @staticmethod
    def backward(ctx, grad):
        return _move(grad, *ctx.arguments), None, None, None, None, None, None


def _move(
    rows: torch.Tensor, route: Route, kernels: Kernels, traffic: Traffic, purpose: str, format: Format | None
) -> torch.Tensor:
    if format is None:
        parcels = rows.contiguous()
    else:
        quantized = kernels.quantize(rows, format)
        # One message: a row's numbers, then its scales, as bytes (no collective library sums or knows FP8).
        parcels = torch.cat([_bytes(quantized.data), _bytes(quantized.scale)], dim=1)
    traffic.add(purpose, parcels[:1].nbytes if len(parcels) else 0, route.send_counts, route.group.rank())
    received = exchange_rows(parcels, route.receive_counts, route.send_counts, route.group)
    if format is None:
        return received
    width = rows.shape[1] * format.dtype.itemsize
    data, scale = _numbers(received[:, :width], format.dtype), _numbers(received[:, width:], format.scale_dtype)
    return kernels.dequantize(QTensor(data, scale, format), rows.dtype)


def _bytes(x_Nc: torch.Tensor) -> torch.Tensor:
    """uint8 [N, c · itemsize]."""
    flat = x_Nc.contiguous().flatten().view(torch.uint8)
    return flat.view(x_Nc.shape[0], x_Nc.shape[1] * x_Nc.itemsize)


def _numbers(bytes_Nb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_bytes`; a copy, since a number must begin at a multiple of its size."""
    flat = bytes_Nb.flatten().clone().view(dtype)
    return flat.view(bytes_Nb.shape[0], bytes_Nb.shape[1] // dtype.itemsize)
