"""Collectives over process groups and plain tensors."""

from dataclasses import dataclass

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


def exchange_rows(rows: torch.Tensor, receive_counts: list[int], send_counts: list[int], group: Group) -> torch.Tensor:
    """Exchange uneven blocks of rows.

    Args:
        rows: [sum(send_counts), ...], contiguous, the blocks for ranks 0, 1, … one after the other; no FP8 dtype, which
            the libraries do not move (send bytes).
        receive_counts: rows expected from each rank.
        send_counts: rows meant for each rank.

    Returns:
        [sum(receive_counts), ...], the blocks of ranks 0, 1, … one after the other.
    """
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, receive_counts, send_counts, group=group)
    return received


def all_gather_stack(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...], contiguous and alike on every rank, to [ranks, n, ...]."""
    gathered = x.new_empty((group.size(), *x.shape))
    # Gloo wants the ranks' parts as one dim, NCCL takes both.
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x, group=group)
    return gathered


def reduce_scatter_stack(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[ranks, n, ...], contiguous, to the sum over ranks of the part that is this rank's, [n, ...]."""
    own = x.new_empty(x.shape[1:])
    dist.reduce_scatter_tensor(own, x.flatten(0, 1), op=dist.ReduceOp.SUM, group=group)
    return own


@dataclass
class PendingRows:
    """An exchange of rows on its way."""

    received: torch.Tensor
    """Not to be read before `wait`."""
    sent: torch.Tensor
    """Kept until then."""
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """The rows, once they have arrived (on an accelerator: what is enqueued from now on runs after that)."""
        self.work.wait()
        return self.received


def start_exchange_rows(
    rows: torch.Tensor, receive_counts: list[int], send_counts: list[int], group: Group
) -> PendingRows:
    """`exchange_rows` that returns at once."""
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=group, async_op=True)
    assert work is not None
    return PendingRows(received, rows, work)
