"""A stand-in for DeepSeek's DeepEP: what the route calls of its V1 `Buffer`, over the group's own exchange.

As strict as the library about shapes, dtypes and handles (deepseek-ai/DeepEP, deep_ep/buffer.py), but that rows may be
FP64, so that a route can be held to 1e-11. What arrives is poison until its event has been waited for.

T tokens, K experts a token, E experts, R ranks, N rows sent, M rows received, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

E4M3 = torch.float8_e4m3fn
TILE = 128
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Config:
    """Sizes of the library's buffers."""

    def get_nvl_buffer_size_hint(self, row_bytes: int, ranks: int) -> int:
        """Bytes; here nothing is allocated."""
        return row_bytes * ranks

    def get_rdma_buffer_size_hint(self, row_bytes: int, ranks: int) -> int:
        """Bytes."""
        return row_bytes * ranks


class Event:
    """The end of an exchange: what it brought can be read once it has been waited for."""

    def __init__(self, bring: Callable[[], None]) -> None:
        self._bring = bring

    def current_stream_wait(self) -> None:
        """Let what was received arrive."""
        self._bring()


@dataclass(frozen=True)
class Handle:
    """A layout that was used once and may be used again."""

    tokens: int
    token_N: torch.Tensor
    """Which token each row that leaves is."""
    sent: list[int]
    received: list[int]


class Buffer:
    """Dispatch and combine."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        assert num_rdma_bytes >= 0
        self.group = group

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """That the library recommends."""
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """That the library recommends."""
        return Config()

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        """Tokens for each rank, node (None: there is one) and expert, and whether each token goes to each rank."""
        assert topk_idx.dtype == torch.int64
        held, tokens = num_experts // self.group.size(), topk_idx.shape[0]
        goes_TR = torch.zeros(tokens, self.group.size(), dtype=torch.bool).scatter_(1, topk_idx // held, True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return goes_TR.sum(0).int(), None, per_expert.int(), goes_TR, None

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        """Tokens, once to each rank: rows, local experts (-1: another rank's), weights, copies for each expert."""
        assert async_finish
        parts = _checked(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            rows, bring = _later([self._exchange(part[handle.token_N], handle.sent, handle.received) for part in parts])
            return rows if len(rows) > 1 else rows[0], None, None, None, None, Event(bring)
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        tokens = len(parts[0])
        assert topk_weights.dtype == torch.float32
        assert topk_weights.shape == topk_idx.shape == (tokens, topk_idx.shape[1])
        token_N = is_token_in_rank.t().nonzero()[:, 1]
        sent = num_tokens_per_rank.tolist()
        assert sent == is_token_in_rank.sum(0).tolist()
        received = self._exchange(num_tokens_per_rank, [1] * len(sent), [1] * len(sent)).tolist()
        used = Handle(tokens, token_N, sent, received)
        arrived = [self._exchange(part[token_N], sent, received) for part in (*parts, topk_idx, topk_weights)]
        *data, choices_MK, weights_MK = arrived
        held = len(num_tokens_per_expert) // self.group.size()
        own_MK = choices_MK - self.group.rank() * held
        foreign_MK = (own_MK < 0) | (own_MK >= held)
        own_MK = own_MK.masked_fill(foreign_MK, -1)
        copies_L = torch.bincount(own_MK[~foreign_MK], minlength=held).tolist()
        (*rows, own_MK, weights_MK), bring = _later([*data, own_MK, weights_MK.masked_fill(foreign_MK, 0.0)])
        return tuple(rows) if len(rows) > 1 else rows[0], own_MK, weights_MK, copies_L, used, Event(bring)

    def combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, async_finish: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, Event]:
        """Rows, and weights where there are some, summed at the ranks of their tokens."""
        assert async_finish
        (rows,) = _checked(x)
        assert len(rows) == sum(handle.received)
        parts = [rows]
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert len(topk_weights) == len(rows)
            parts.append(topk_weights.contiguous())
        summed = [self._sum(part, handle) for part in parts]
        (combined, *columns), bring = _later(summed)
        return combined, columns[0] if columns else None, Event(bring)

    def _sum(self, part: torch.Tensor, handle: Handle) -> torch.Tensor:
        home = self._exchange(part, handle.received, handle.sent)
        exact = torch.float64 if part.dtype == torch.float64 else torch.float32
        total = torch.zeros(handle.tokens, part.shape[1], dtype=exact).index_add_(0, handle.token_N, home.to(exact))
        return total.to(part.dtype)

    def _exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Gloo knows no FP8: bytes travel."""
        as_bytes = rows.contiguous().view(torch.uint8) if rows.dtype == E4M3 else rows.contiguous()
        into = as_bytes.new_empty(sum(received), *as_bytes.shape[1:])
        dist.all_to_all_single(into, as_bytes, received, sent, group=self.group)
        return into.view(rows.dtype)


def _checked(x: Rows) -> list[torch.Tensor]:
    """The rows and, in FP8, their scales."""
    if isinstance(x, torch.Tensor):
        assert x.dtype in (torch.bfloat16, torch.float64), x.dtype
        assert x.is_contiguous()
        return [x]
    data, scale = x
    assert (data.dtype, scale.dtype) == (E4M3, torch.float32)
    assert data.shape[1] % TILE == 0
    assert scale.shape == (data.shape[0], data.shape[1] // TILE)
    assert data.is_contiguous()
    assert scale.is_contiguous()
    return [data, scale]


def _later(arriving: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
    """Tensors full of poison, and what fills them."""
    shown = tuple(_poison(tensor) for tensor in arriving)

    def bring() -> None:
        for into, tensor in zip(shown, arriving, strict=True):
            into.copy_(tensor)

    return shown, bring


def _poison(like: torch.Tensor) -> torch.Tensor:
    if like.dtype == E4M3:
        return torch.full_like(like.view(torch.uint8), 0x7F).view(E4M3)
    return torch.full_like(like, float("nan") if like.is_floating_point() else -(2**40))
