"""Collectives over process groups and plain tensors."""

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def all_reduce_sum(values: torch.Tensor, group: Group | None = None) -> torch.Tensor:
    """Sum `values` over the group, in place, and return it."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """Row r of the result is what rank r counted for this rank.

    Args:
        counts: int64 [ranks, n], row r meant for rank r.
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, receive_counts, send_counts, group):
        ctx.receive_counts, ctx.send_counts, ctx.group = receive_counts, send_counts, group
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        returned = grad.new_empty((sum(ctx.send_counts), *grad.shape[1:]))
        dist.all_to_all_single(returned, grad.contiguous(), ctx.send_counts, ctx.receive_counts, group=ctx.group)
        return returned, None, None, None


def all_to_all(rows: torch.Tensor, receive_counts: list[int], send_counts: list[int], group: Group) -> torch.Tensor:
    """Exchange uneven blocks of rows; differentiable (the gradient travels the other way).

    Args:
        rows: [sum(send_counts), ...], the blocks for ranks 0, 1, … one after the other.
        receive_counts: rows expected from each rank.
        send_counts: rows meant for each rank.

    Returns:
        [sum(receive_counts), ...], the blocks of ranks 0, 1, … one after the other.
    """
    exchanged: torch.Tensor = _AllToAll.apply(rows, receive_counts, send_counts, group)
    return exchanged
