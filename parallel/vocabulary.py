"""Cross-entropy over a vocabulary that tensor ranks split: no rank sees the logits of all entries.

N rows, V entries, v = V / ranks entries on this rank.
"""

import torch

from octofold.backends.collectives import Group, all_reduce_max, all_reduce_sum
from octofold.parallel.sequence import in_window


def summed_cross_entropy(logits_Nv: torch.Tensor, labels_N: torch.Tensor, ignored: int, group: Group) -> torch.Tensor:
    """Nats summed over the labels that are not `ignored`: a scalar, the same on every rank of the group.

    −Σ log softmax(z)_label = Σ (log Σ exp(z − m) + m − z_label) with m the largest logit; the sum over entries and the
    label's logit come from the ranks that hold them. Each rank's gradient is that of its own logits.

    Args:
        logits_Nv: FP32 or FP64; rank r of the group holds entries r·v … (r+1)·v − 1.
        labels_N: int64.
    """
    loss: torch.Tensor = _SplitCrossEntropy.apply(logits_Nv, labels_N, ignored, group)
    return loss


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Nv, labels_N, ignored, group):
        counted_N = labels_N != ignored
        here_N, entries_N = in_window(labels_N, logits_Nv.shape[1], group)
        largest_N = logits_Nv.amax(1)
        all_reduce_max(largest_N, group)
        weights_Nv = (logits_Nv - largest_N[:, None]).exp_()
        of_label_N = logits_Nv.gather(1, entries_N[:, None])[:, 0] * here_N
        total_N, of_label_N = all_reduce_sum(torch.stack([weights_Nv.sum(1), of_label_N]), group)
        ctx.save_for_backward(weights_Nv.div_(total_N[:, None]), counted_N, here_N, entries_N)
        nats_N = total_N.log() + largest_N - of_label_N
        return torch.where(counted_N, nats_N, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        weights_Nv, counted_N, here_N, entries_N = ctx.saved_tensors
        grad_Nv = weights_Nv.clone()
        grad_Nv.scatter_add_(1, entries_N[:, None], -here_N[:, None].to(grad_Nv.dtype))
        return grad_Nv.mul_((counted_N * grad)[:, None]), None, None, None
