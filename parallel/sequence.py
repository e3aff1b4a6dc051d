"""A sequence whose positions are spread over ranks: what a module sees of the tokens that other ranks hold.

Context ranks hold different positions. Tensor ranks hold the same ones while they compute different heads, widths or
rows of the vocabulary; between those products each keeps its own share of the positions (sequence parallelism,
arXiv 2205.05198), so that no rank keeps or norms what another does.

B sequences, S positions of the whole sequence, Q those of a context rank, P = Q / tensor ranks those of this rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from octofold.backends.collectives import Group, all_gather_stack, all_reduce_sum, reduce_scatter_stack

Attention = Callable[..., torch.Tensor]


class WholeSequence:
    """Every position is on this rank."""

    ranks = 1
    """That share a sequence."""

    def own(self, x_BQw: torch.Tensor) -> torch.Tensor:
        """This rank's positions of what is known for all of the context rank: [B, Q, …] to [B, P, …]."""
        return x_BQw

    def enter(self, x_BPw: torch.Tensor) -> torch.Tensor:
        """Before a product of which each tensor rank computes some outputs: [B, P, w] to [B, Q, w]."""
        return x_BPw

    def leave(self, x_BQw: torch.Tensor) -> torch.Tensor:
        """After a product of which each tensor rank has a part of every sum: [B, Q, w] to [B, P, w]."""
        return x_BQw

    def lookup(self, tokens_BQ: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Rows of a table that tensor ranks split: [B, P, D]."""
        return F.embedding(tokens_BQ, weight_VD)

    def everyone(self, x_BPw: torch.Tensor) -> torch.Tensor:
        """All positions, in the order of the sequence: [B, P, w] to [B, S, w]."""
        return x_BPw

    def attend(
        self,
        attention: Attention,
        q_BHQd: torch.Tensor,
        k_BHSd: torch.Tensor,
        v_BHSv: torch.Tensor,
        *,
        scale: float,
        doc_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention of this context rank's queries over all keys before them: [B, H, Q, v]."""
        return attention(q_BHQd, k_BHSd, v_BHSv, scale=scale, doc_ids_BS=doc_ids_BS)

    def mean(self, x_BPw: torch.Tensor) -> torch.Tensor:
        """Mean over all positions, known to every rank that shares them: [B, P, …] to [B, …].

        For a loss that each of them computes: the gradient is this rank's part of it.
        """
        return x_BPw.mean(1)


class SplitSequence(WholeSequence):
    """Positions are spread over the ranks of two groups."""

    def __init__(self, tensor: Group, context: Group, sequence: Group) -> None:
        """
        Args:
            sequence: both groups' ranks, tensor innermost.
        """
        self.tensor, self.context, self.sequence = tensor, context, sequence
        self.ranks = sequence.size()

    def own(self, x_BQw: torch.Tensor) -> torch.Tensor:
        return x_BQw.chunk(self.tensor.size(), dim=1)[self.tensor.rank()]

    def enter(self, x_BPw: torch.Tensor) -> torch.Tensor:
        return gather_positions(x_BPw, self.tensor)

    def leave(self, x_BQw: torch.Tensor) -> torch.Tensor:
        return x_BQw if self.tensor.size() == 1 else _Scatter.apply(x_BQw, self.tensor)

    def lookup(self, tokens_BQ: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        here_BQ, rows_BQ = in_window(tokens_BQ, weight_VD.shape[0], self.tensor)
        return self.leave(F.embedding(rows_BQ, weight_VD) * here_BQ[..., None].to(weight_VD.dtype))

    def everyone(self, x_BPw: torch.Tensor) -> torch.Tensor:
        gathered = gather_positions(x_BPw, self.sequence)
        return in_order(gathered, self.context.size())

    def attend(
        self,
        attention: Attention,
        q_BHQd: torch.Tensor,
        k_BHSd: torch.Tensor,
        v_BHSv: torch.Tensor,
        *,
        scale: float,
        doc_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs = []
        for q, (_, end) in zip(
            q_BHQd.chunk(chunks_a_rank(self.context.size()), dim=2),
            windows(k_BHSd.shape[2], self.context.rank(), self.context.size()),
            strict=True,
        ):
            documents = None if doc_ids_BS is None else doc_ids_BS[:, :end]
            outputs.append(attention(q, k_BHSd[:, :, :end], v_BHSv[:, :, :end], scale=scale, doc_ids_BS=documents))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def mean(self, x_BPw: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = _Total.apply(x_BPw.sum(1), self.sequence)
        return total / (x_BPw.shape[1] * self.ranks)


# --- which positions a context rank holds ----------------------------------------------------------------------------


def chunks_a_rank(ranks: int) -> int:
    """Runs of neighbouring positions that a context rank holds."""
    return 2 if ranks > 1 else 1


def windows(length: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """[begin, end) of the runs of positions that context rank `rank` holds.

    Causal attention costs a query what stands before it, so a rank holds chunk r from the front and chunk r from the
    back of 2·ranks chunks: all ranks have as much to do.

    Args:
        length: a multiple of 2·ranks where there are several.
    """
    chunks = chunks_a_rank(ranks) * ranks
    assert length % chunks == 0, (length, ranks)
    size = length // chunks
    numbers = [rank] if ranks == 1 else [rank, chunks - 1 - rank]
    return [(number * size, (number + 1) * size) for number in numbers]


def positions_of(x_BS: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """[B, S, …] to the positions of a context rank, [B, Q, …]."""
    if ranks == 1:
        return x_BS
    return torch.cat([x_BS[:, begin:end] for begin, end in windows(x_BS.shape[1], rank, ranks)], dim=1)


def in_order(x_BSw: torch.Tensor, ranks: int) -> torch.Tensor:
    """[B, S, …] one context rank's positions after the other, to the order of the sequence."""
    if ranks == 1:
        return x_BSw
    chunks = x_BSw.chunk(2 * ranks, dim=1)  # 0, 2n-1, 1, 2n-2, …
    return torch.cat([*chunks[0::2], *chunks[1::2][::-1]], dim=1)


# --- rows of a vocabulary that tensor ranks split --------------------------------------------------------------------


def in_window(ids: torch.Tensor, rows: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ids are among this rank's `rows` rows of a table, and their row here (0 for the others)."""
    local = ids - group.rank() * rows
    here = (local >= 0) & (local < rows)
    return here, local * here


# --- exchanges -------------------------------------------------------------------------------------------------------


def gather_positions(x_BPw: torch.Tensor, group: Group) -> torch.Tensor:
    """[B, P, w] of every rank of the group, one after the other: [B, P·ranks, w]. The gradient is summed over ranks."""
    return x_BPw if group.size() == 1 else _Gather.apply(x_BPw, group)


def _gathered(x_BPw: torch.Tensor, group: Group) -> torch.Tensor:
    return all_gather_stack(x_BPw.contiguous(), group).transpose(0, 1).flatten(1, 2)


def _scattered(x_BQw: torch.Tensor, group: Group) -> torch.Tensor:
    parts_RBPw = x_BQw.unflatten(1, (group.size(), -1)).transpose(0, 1)
    return reduce_scatter_stack(parts_RBPw.contiguous(), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BPw, group):
        ctx.group = group
        return _gathered(x_BPw, group)

    @staticmethod
    def backward(ctx, grad_BQw):
        return _scattered(grad_BQw, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BQw, group):
        ctx.group = group
        return _scattered(x_BQw, group)

    @staticmethod
    def backward(ctx, grad_BPw):
        return _gathered(grad_BPw, ctx.group), None


class _Total(torch.autograd.Function):
    """A sum over ranks of which each rank uses the whole for a loss that counts once: its own part's gradient."""

    @staticmethod
    def forward(ctx, x, group):
        return all_reduce_sum(x.clone(), group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
