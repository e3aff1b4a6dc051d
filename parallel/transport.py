"""Rows of tokens between ranks, as they are or in eight bits with scales: a format is a value here.

N rows here, M rows received, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from octofold.backends.collectives import Group, PendingRows, start_exchange_rows
from octofold.kernels.qtensor import Format, QTensor
from octofold.kernels.registry import Kernels
from octofold.parallel.passage import Tensors, travel


@dataclass(frozen=True)
class Transport:
    """What travels to the experts of other ranks; the way back is in the dtype of the model."""

    dispatch: Format | None = None
    """Of tokens; None: as they are. A tile is part of one row."""
    gradient: Format | None = None
    """Of gradients of the experts' outputs, which travel the same way."""


PURPOSES = ("dispatch", "combine", "dispatch_gradient", "combine_gradient")
"""Of what travels: tokens to experts and back; the gradient of the combination travels to the experts, too."""
COUNTED = (*PURPOSES, *(f"network_{purpose}" for purpose in PURPOSES), "dropped_tokens")
"""Bytes that a rank has sent to other ranks, by purpose; those of them to other nodes; and copies of tokens that found
no place (parallel/expert_capacity.py)."""


@dataclass(frozen=True)
class Route:
    """Who gets how many rows. Reversed for the way back."""

    group: Group
    send_counts: list[int]
    """Rows meant for each rank."""
    receive_counts: list[int]
    """Rows expected from each rank."""
    nodes: Sequence[int] = ()
    """The node of each rank; empty: all are on one."""

    @property
    def back(self) -> "Route":
        """The way back."""
        return Route(self.group, self.receive_counts, self.send_counts, self.nodes)


@dataclass
class Traffic:
    """What this rank's layers have counted since it was last taken, by name (`COUNTED`)."""

    counts: dict[str, float | torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, count: float | torch.Tensor) -> None:
        """Count; a tensor (scalar) stays on its device until somebody asks."""
        self.counts[name] = self.counts.get(name, 0) + count

    def add_rows(self, purpose: str, row_bytes: int, route: Route) -> None:
        """Count rows that leave; those for this rank itself do not."""
        own, counts, nodes = route.group.rank(), route.send_counts, route.nodes
        self.add(purpose, row_bytes * (sum(counts) - counts[own]))
        if nodes:
            far = sum(count for count, node in zip(counts, nodes, strict=True) if node != nodes[own])
            self.add(f"network_{purpose}", row_bytes * far)

    def take(self) -> dict[str, float]:
        """What was counted; the count begins again."""
        taken, self.counts = self.counts, {}
        return {name: float(count) for name, count in taken.items()}


class Packing:
    """How rows, and columns that belong to them, become one message and rows again.

    Without a format and further columns the message is the rows; else a row of it is bytes: the row's numbers, its
    scales, the further columns (no collective library sums or knows FP8).
    """

    def __init__(self, tensors: Tensors, kernels: Kernels, format: Format | None = None) -> None:
        """`tensors`: rows [N, D], then further columns [N, c]; only their dtypes and widths are remembered."""
        self.kernels, self.format = kernels, format
        self.columns = [(tensor.shape[1], tensor.dtype) for tensor in tensors]

    def pack(self, tensors: Tensors) -> torch.Tensor:
        """[N, bytes], or [N, D] as they are."""
        rows, *others = tensors
        parts = [rows]
        if self.format is not None:
            quantized = self.kernels.quantize(rows, self.format)
            parts = [quantized.data, quantized.scale]
        parts += others
        return rows.contiguous() if len(parts) == 1 else torch.cat([_bytes(part) for part in parts], dim=1)

    def unpack(self, parcels: torch.Tensor) -> Tensors:
        """The tensors; rows in their first dtype, whatever they travelled as."""
        (width, dtype), *others = self.columns
        if self.format is None and not others:
            return (parcels,)
        kinds = [(width, dtype), *others]
        if self.format is not None:
            tiles = self.format.tiles(1, width)[1]
            kinds = [(width, self.format.dtype), (tiles, self.format.scale_dtype), *others]
        sizes = [wide * kind.itemsize for wide, kind in kinds]
        numbers = [_numbers(part, kind) for part, (_, kind) in zip(parcels.split(sizes, 1), kinds, strict=True)]
        if self.format is not None:
            data, scale, *numbers = numbers
            numbers.insert(0, self.kernels.dequantize(QTensor(data, scale, self.format), dtype))
        return tuple(numbers)


class Exchange:
    """A passage (parallel/passage.py): uneven blocks of rows, for ranks 0, 1, … one after the other; so they arrive."""

    def __init__(
        self, route: Route, kernels: Kernels, traffic: Traffic, purpose: str, format: Format | None = None
    ) -> None:
        """
        Args:
            purpose: what the bytes are counted as (`Traffic`).
            format: rows are sent so and dequantised on arrival; None: sent as they are.
        """
        self.route, self.kernels, self.traffic = route, kernels, traffic
        self.purpose, self.format = purpose, format

    def begin(self, tensors: Tensors) -> tuple[Packing, PendingRows]:
        packing = Packing(tensors, self.kernels, self.format)
        return packing, send(packing.pack(tensors), self.route, self.traffic, self.purpose)

    def end(self, pending: tuple[Packing, PendingRows]) -> Tensors:
        packing, received = pending
        return packing.unpack(received.wait())


def send(parcels: torch.Tensor, route: Route, traffic: Traffic, purpose: str) -> PendingRows:
    """Start an exchange of blocks of rows, and count their bytes."""
    row_bytes = parcels.shape[1] * parcels.itemsize
    traffic.add_rows(purpose, row_bytes, route)
    return start_exchange_rows(parcels, route.receive_counts, route.send_counts, route.group)


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
    """`Exchange` without a pause: [N, D] to [M, D] in the same dtype. The gradient travels the other way."""
    there, back = round_trip(route, kernels, traffic, purpose, forward, backward)
    return travel(there, back, rows_ND)[0]


def round_trip(
    route: Route,
    kernels: Kernels,
    traffic: Traffic,
    purpose: str,
    forward: Format | None = None,
    backward: Format | None = None,
) -> tuple[Exchange, Exchange]:
    """An exchange and its transpose, which carries the gradient."""
    back = Exchange(route.back, kernels, traffic, f"{purpose}_gradient", backward)
    return Exchange(route, kernels, traffic, purpose, forward), back


def _bytes(x_Nc: torch.Tensor) -> torch.Tensor:
    """uint8 [N, c · itemsize]."""
    flat = x_Nc.contiguous().flatten().view(torch.uint8)
    return flat.view(x_Nc.shape[0], x_Nc.shape[1] * x_Nc.itemsize)


def _numbers(bytes_Nb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_bytes`; a copy, since a number must begin at a multiple of its size."""
    flat = bytes_Nb.flatten().clone().view(dtype)
    return flat.view(bytes_Nb.shape[0], bytes_Nb.shape[1] // dtype.itemsize)
