"""Collectives over process groups and plain tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

Group = dist.ProcessGroup
Sum = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all ranks of a group, in place, and returns it."""

_TIMED = tuple(vars(dist)[name] for name in ("ProcessGroupGloo", "ProcessGroupNCCL") if name in vars(dist))
"""Those of this build of torch that keep a limit a group; the fake one of a trace has none."""

sums: WeakKeyDictionary[Group, Sum] = WeakKeyDictionary()
"""Groups over which sums are not taken in one step (backends/hierarchical.py)."""


def all_reduce_sum(values: torch.Tensor, group: Group | None = None) -> torch.Tensor:
    """Sum `values` over the group (None: all ranks), in place, and return it."""
    group = group or world()
    if values.device.type == "npu" and values.dtype == torch.float64:
        # HCCL sums no FP64 before Ascend 950. What is summed in it are a few numbers: losses and norms.
        gathered = all_gather_stack(values.contiguous().view(torch.int64).view(1, -1), group)
        return values.copy_(gathered.view(torch.float64).sum(0).view(values.shape))
    if group in sums:
        return sums[group](values)
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def all_reduce_max(values: torch.Tensor, group: Group | None = None) -> torch.Tensor:
    """The elementwise maximum of `values` over the group (None: all ranks), in place, returned."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group or world())
    return values


def broadcast(values: torch.Tensor, source: int) -> torch.Tensor:
    """Fill `values` with those of the global rank `source`, on all ranks, in place, and return it."""
    dist.broadcast(values, src=source)
    return values


def world() -> Group:
    """The default group, of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def share_timeout(group: Group) -> None:
    """Give a group the limit of a call that the default group has: a mesh makes its groups with the library's own.

    For gloo and NCCL. HCCL's is one for all groups, in the environment (backends/hccl.py).
    """
    for device in group._device_types:
        if device.type in ("cpu", "cuda") and isinstance(group._get_backend(device), _TIMED):
            limit = world()._get_backend(device).options._timeout
            dist.distributed_c10d._set_pg_timeout(limit, group)


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
    dist.all_gather_single(gathered.flatten(0, 1), x, group=group)
    return gathered


def reduce_scatter_stack(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[ranks, n, ...], contiguous, to the sum over ranks of the part that is this rank's, [n, ...]."""
    own = x.new_empty(x.shape[1:])
    dist.reduce_scatter_single(own, x.flatten(0, 1), op=dist.ReduceOp.SUM, group=group)
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


def all_gather_bytes(own: bytes, device: torch.device) -> list[bytes]:
    """What each rank of the world gives, in the order of ranks.

    Args:
        device: of the tensors that ranks exchange.
    """
    sizes = all_gather_stack(torch.tensor([len(own)], device=device), world()).flatten().tolist()
    # One more than the longest, so that no size is 0.
    padded = torch.zeros(max(sizes) + 1, dtype=torch.uint8, device=device)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device) if own else 0
    gathered = all_gather_stack(padded, world()).cpu()
    return [bytes(row[:size].tolist()) for row, size in zip(gathered, sizes, strict=True)]


def send_and_receive(
    sent: list[tuple[torch.Tensor, int]], received: list[tuple[torch.Tensor, int]], group: Group
) -> None:
    """Messages to and from other ranks, all at once; returns when all have been sent and have arrived.

    Between two ranks they arrive in the order in which both name them.

    Args:
        sent: contiguous tensors, and the ranks in the group that get them.
        received: tensors to fill, and the ranks that they come from.
    """
    messages = [dist.P2POp(dist.isend, x, group=group, group_peer=rank) for x, rank in sent]
    messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=rank) for x, rank in received]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
