"""The route through DeepEP, DeepSeek's library of exchange kernels for NVLink and RDMA (its V1 interface, `Buffer`).

Written against the library's source; tests run it on a stand-in (tests/fake_deep_ep.py), and nothing has run it on
several GPUs with the library installed yet. A token travels once to each rank that holds some of its experts; the
library itself sends it once across the network for each node. It waits for the host inside `dispatch`. Rows are BF16 or
E4M3 (train/config.py refuses other runs), weights of the gate FP32.

T tokens, K experts a token, M rows received, D width.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from octofold.backends.collectives import Group
from octofold.kernels.qtensor import E4M3, Format, QTensor
from octofold.kernels.registry import Kernels
from octofold.parallel.config import DEEPEP_TILE
from octofold.parallel.expert import ExchangedExperts, Experts, Routing
from octofold.parallel.expert_slices import WholeExperts
from octofold.parallel.passage import Tensors, Trip, travel

TILE = Format((1, DEEPEP_TILE), scale="float")
"""The library's FP8: E4M3, an FP32 scale for 128 numbers of a row."""


def why_unsupported(device_type: str) -> str | None:
    """None where DeepEP can serve."""
    if device_type != "cuda":
        return f"DeepEP's kernels are for CUDA, and the run is on {device_type}"
    if find_spec("deep_ep") is None:
        return "the package deep_ep is not installed"
    return None


@cache
def _buffer(group: Group, row_bytes: int) -> Any:
    """The library's communication buffer, one for all layers of a group."""
    library = import_module("deep_ep").Buffer
    ranks = group.size()
    configs = [library.get_dispatch_config(ranks), library.get_combine_config(ranks)]
    return library(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
    )


class DeepEpExperts(ExchangedExperts):
    """Dispatch and combine by DeepEP; what happens between them is the two-stage route's."""

    def __init__(
        self,
        group: Group,
        *,
        nodes: tuple[int, ...] = (),
        overlap: bool = True,
        slices: WholeExperts | None = None,
    ) -> None:
        assert slices is None, "DeepEP brings rows to whole experts"
        super().__init__(group, nodes=nodes, overlap=overlap)

    def _run(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        routing: Routing,
        kernels: Kernels,
        while_travelling: Callable[[], None],
    ) -> torch.Tensor:
        buffer = _buffer(self.group, x_TD.shape[1] * x_TD.itemsize)
        held = routing.counts_E.shape[0] // self.ranks
        there = _Spread(buffer, kernels, self.transport.dispatch, routing)
        trip = Trip(there, _Collect(buffer, there))
        ticket = trip.depart(x_TD, routing.weights_TK)
        while_travelling()
        x_MD, weights_MK = trip.arrive(ticket)
        own_MK = there.own_MK.where(there.own_MK >= 0, held)
        blocks_SBL = torch.tensor([[there.copies_L]], device=x_TD.device)
        copies_S = [sum(there.copies_L)]
        y_MD = self._compute_choices(experts, x_MD, own_MK, weights_MK, blocks_SBL, copies_S, kernels)
        # The gradient goes where the tokens went, in BF16: the library remembers one layout in one format.
        return travel(_Collect(buffer, there), _Spread(buffer, kernels, None, routing, there), y_MD)[0]


class _Spread:
    """A passage: tokens to the ranks of their experts; the first time with the gate's choice, then as remembered."""

    def __init__(
        self, buffer: Any, kernels: Kernels, format: Format | None, routing: Routing, first: "_Spread | None" = None
    ) -> None:
        self.buffer, self.kernels, self.format = buffer, kernels, format
        self.routing, self.first = routing, first
        self.handle: Any = None
        self.dtype = torch.bfloat16
        self.own_MK = torch.empty(0)
        self.copies_L: list[int] = []

    def begin(self, tensors: Tensors) -> tuple[Any, ...]:
        rows: Any = tensors[0].contiguous()
        self.dtype = rows.dtype
        if self.format is not None:
            assert (self.format.tile, self.format.dtype) == (TILE.tile, E4M3), f"DeepEP has no {self.format}"
            quantized = self.kernels.quantize(rows, self.format)
            rows = quantized.data, quantized.scale.float()
        if self.first is not None:
            return self.buffer.dispatch(rows, handle=self.first.handle, async_finish=True)
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            self.routing.experts_TK, self.routing.counts_E.shape[0]
        )
        return self.buffer.dispatch(
            rows,
            topk_idx=self.routing.experts_TK,
            topk_weights=tensors[1].float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )

    def end(self, pending: tuple[Any, ...]) -> Tensors:
        rows, own_MK, weights_MK, copies_L, handle, event = pending
        event.current_stream_wait()
        if self.format is not None:
            data, scale = rows
            rows = self.kernels.dequantize(QTensor(data, scale, TILE), self.dtype)
        if self.first is not None:
            return (rows,)
        self.own_MK, self.copies_L, self.handle = own_MK, copies_L, handle
        return rows, weights_MK


class _Collect:
    """The transpose: rows summed at the ranks of their tokens, and columns of FP32 with them where there are some."""

    def __init__(self, buffer: Any, spread: _Spread) -> None:
        self.buffer, self.spread = buffer, spread

    def begin(self, tensors: Tensors) -> tuple[Any, ...]:
        columns = tensors[1].float() if len(tensors) > 1 else None
        rows = tensors[0].contiguous()
        return self.buffer.combine(rows, self.spread.handle, topk_weights=columns, async_finish=True)

    def end(self, pending: tuple[Any, ...]) -> Tensors:
        rows, columns, event = pending
        event.current_stream_wait()
        return (rows,) if columns is None else (rows, columns)
