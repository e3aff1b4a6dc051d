"""What ranks do in the tests of sequences and vocabularies that several ranks share: each function, on every rank."""

import torch
import torch.distributed as dist

from octofold.kernels.reference.attention import attention
from octofold.parallel.config import ParallelConfig
from octofold.parallel.mesh import build_meshes
from octofold.parallel.sequence import SplitSequence, positions_of
from octofold.train.loss import summed_cross_entropy


def shared(context: int, tensor: int) -> SplitSequence:
    """All ranks share one sequence."""
    meshes = build_meshes(ParallelConfig(data_shard=1, context=context, tensor=tensor), "cpu")
    mesh = [meshes.dense["tensor"], meshes.dense["context"], meshes.shared["sequence"]]
    return SplitSequence(*(view.get_group() for view in mesh))


def exchanged(context: int, tensor: int, x_BSw: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each exchange gives this rank, and the gradient of its own positions for the loss Σ sin(y)·rank weight."""
    sequence = shared(context, tensor)
    held_BQw = positions_of(x_BSw, sequence.context.rank(), context)
    found = {"held": held_BQw, "own": sequence.own(held_BQw)}
    for name in ("enter", "everyone", "mean"):
        own_BPw = found["own"].clone().requires_grad_()
        result = getattr(sequence, name)(own_BPw)
        # Each rank uses what it got in its own way; a mean is used alike by all.
        weight = 1.0 if name == "mean" else dist.get_rank() + 1.0
        (weight * result.sin()).sum().backward()
        assert own_BPw.grad is not None
        found |= {name: result.detach(), f"{name}_gradient": own_BPw.grad}
    partial_BQw = (held_BQw * (sequence.tensor.rank() + 1)).requires_grad_()
    left = sequence.leave(partial_BQw)
    left.sin().sum().backward()
    assert partial_BQw.grad is not None
    return found | {"leave": left.detach(), "leave_gradient": partial_BQw.grad}


def attended(
    context: int, qkv: list[torch.Tensor], doc_ids_BS: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Attention of this rank's queries, and gradients of its queries and, summed over ranks, of all keys and values."""
    sequence = shared(context, 1)
    q, k, v = (x.clone() for x in qkv)
    q = positions_of(q.transpose(1, 2), sequence.context.rank(), context).transpose(1, 2).contiguous()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = sequence.attend(attention, *inputs, scale=0.3, doc_ids_BS=doc_ids_BS)
    out.sin().sum().backward()
    gradients = [x.grad for x in inputs if x.grad is not None]
    for gradient in gradients[1:]:
        dist.all_reduce(gradient)
    return out.detach(), gradients


def looked_up(table_VD: torch.Tensor, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a table that all ranks split, of this rank's positions, and the gradient of this rank's part of it."""
    sequence = shared(1, dist.get_world_size())
    part = table_VD.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    rows = sequence.lookup(tokens_BS, part)
    rows.sin().sum().backward()
    assert part.grad is not None
    return rows.detach(), part.grad


def cross_entropy(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss over a vocabulary that all ranks split, and the gradient of this rank's logits."""
    part = logits_BSV.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone().requires_grad_()
    loss = summed_cross_entropy(part, labels_BS, dist.group.WORLD)
    (3.0 * loss).backward()
    assert part.grad is not None
    return loss.item(), part.grad
