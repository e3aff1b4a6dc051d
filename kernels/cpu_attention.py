"""Causal attention for CPUs: blocks of queries small enough for the cache, the upper triangle never computed.

The memory of a call is one block of scores, which the backward pass forms again. In BF16 the scores and the weights are
rounded to BF16, as in every unfused BF16 attention; inside the softmax, and over the blocks that a key or value takes
part in, sums are FP32. Several times faster on CPUs than torch's scaled_dot_product_attention, which has no fused path
for keys wider than values (benchmarks/train_cpu.py).
"""

from collections.abc import Iterator

import torch

from octofold.kernels.cpu_products import matmul
from octofold.kernels.recompute import recomputed
from octofold.kernels.registry import Workload

BLOCK = 128
"""Queries at once: 8 heads x 128 x 512 BF16 scores are 1 MiB, a core's second-level cache."""


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


def _blocks(queries: int, length: int, doc_ids_S: torch.Tensor | None) -> Iterator[tuple[slice, int, int, int]]:
    """Yield (queries, position of the first, position after the last, first key).

    Keys before the first query's document are invisible to all.
    """
    for first in range(length - queries, length, BLOCK):
        end = min(first + BLOCK, length)
        key = 0 if doc_ids_S is None else int(torch.searchsorted(doc_ids_S, doc_ids_S[first]))
        yield slice(first - (length - queries), end - (length - queries)), first, end, key


def _weights(q_HQd, k_HKd, first, end, key, doc_ids_S, above):
    """softmax(q kᵀ), [H, Q, K] with weight 0 where a query may not look."""
    scores = matmul(q_HQd, k_HKd.transpose(1, 2))
    scores[:, :, first - key :].add_(above[: end - first, : end - first])
    if doc_ids_S is not None:
        scores.masked_fill_(doc_ids_S[first:end, None] != doc_ids_S[None, key:end], float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQd, k_BHSd, v_BHSv, scale, doc_ids_BS):
        scaled_BHQd = q_BHQd * scale
        batch, heads, queries, _ = q_BHQd.shape
        out_BHQv = q_BHQd.new_empty(batch, heads, queries, v_BHSv.shape[-1])
        above = q_BHQd.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        for b in range(batch):
            doc_ids_S = None if doc_ids_BS is None else doc_ids_BS[b]
            for rows, first, end, key in _blocks(queries, k_BHSd.shape[2], doc_ids_S):
                q, k = scaled_BHQd[b, :, rows], k_BHSd[b, :, key:end]
                weights = _weights(q, k, first, end, key, doc_ids_S, above)
                out_BHQv[b, :, rows] = matmul(weights, v_BHSv[b, :, key:end])
        # Not the scaled queries: the operands themselves may be formed again.
        ctx.save_for_backward(q_BHQd, k_BHSd, v_BHSv, doc_ids_BS)
        ctx.scale = scale
        return out_BHQv

    @staticmethod
    def backward(ctx, grad_BHQv):
        q_BHQd, k_BHSd, v_BHSv, doc_ids_BS = ctx.saved_tensors
        scaled_BHQd = q_BHQd * ctx.scale
        dtype, grad_BHQv = scaled_BHQd.dtype, grad_BHQv.contiguous()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        grad_q = torch.empty_like(scaled_BHQd)
        grad_k, grad_v = torch.zeros_like(k_BHSd, dtype=exact), torch.zeros_like(v_BHSv, dtype=exact)
        above = scaled_BHQd.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        for b in range(scaled_BHQd.shape[0]):
            doc_ids_S = None if doc_ids_BS is None else doc_ids_BS[b]
            for rows, first, end, key in _blocks(scaled_BHQd.shape[2], k_BHSd.shape[2], doc_ids_S):
                q, k, v = scaled_BHQd[b, :, rows], k_BHSd[b, :, key:end], v_BHSv[b, :, key:end]
                grad = grad_BHQv[b, :, rows]
                weights = _weights(q, k, first, end, key, doc_ids_S, above)
                grad_v[b, :, key:end] += matmul(weights.transpose(1, 2), grad)
                grad_weights = matmul(grad, v.transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
                grad_q[b, :, rows] = matmul(grad_scores, k)
                grad_k[b, :, key:end] += matmul(grad_scores.transpose(1, 2), q)
        return grad_q.mul_(ctx.scale), grad_k.to(dtype), grad_v.to(dtype), None, None


def attention(
    q_BHQd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels/reference/attention.py."""
    operands = (recomputed("up_projection", torch.Tensor.contiguous, x) for x in (q_BHQd, k_BHSd, v_BHSv))
    out: torch.Tensor = _Attention.apply(*operands, scale, doc_ids_BS)
    return out
