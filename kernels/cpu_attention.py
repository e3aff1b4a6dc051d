"""Causal attention for CPUs: blocks of queries small enough for the cache, the upper triangle never computed.

The memory of a call is one block of scores; the backward pass forms them again from the saved log-sum-exp, as in
FlashAttention (Dao 2022). In BF16 the scores and weights are rounded to BF16 (as in every unfused BF16 attention), the
softmax's sums and the gradients of keys and values accumulate in FP32. Several times faster on CPUs than torch's
scaled_dot_product_attention, which has no fused path for keys wider than values (benchmarks/train_cpu.py).
"""

from collections.abc import Iterator

import torch

from octofold.kernels.registry import Workload

BLOCK = 128
"""Queries at once: 8 heads x 128 x 512 BF16 scores are 1 MiB, a core's second-level cache."""


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


def _blocks(length: int, doc_ids_S: torch.Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end of queries, first key): keys before the first query's document are invisible to all."""
    for first in range(0, length, BLOCK):
        key = 0 if doc_ids_S is None else int(torch.searchsorted(doc_ids_S, doc_ids_S[first]))
        yield first, min(first + BLOCK, length), key


def _masked_scores(q_HQd, k_HKd, scale, first, end, key, doc_ids_S, above):
    """scale · q kᵀ with −inf where a query may not look."""
    scores = torch.bmm(q_HQd, k_HKd.transpose(1, 2)).mul_(scale)
    diagonal = scores[:, :, first - key :]
    diagonal.add_(above[: end - first, : end - first])
    if doc_ids_S is not None:
        other_document = doc_ids_S[first:end, None] != doc_ids_S[None, key:end]
        scores.masked_fill_(other_document, float("-inf"))
    return scores


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHSd, k_BHSd, v_BHSv, scale, doc_ids_BS):
        batch, heads, length, _ = q_BHSd.shape
        exact = torch.float64 if q_BHSd.dtype == torch.float64 else torch.float32
        out_BHSv = q_BHSd.new_empty(batch, heads, length, v_BHSv.shape[-1])
        logsumexp_BHS = q_BHSd.new_empty(batch, heads, length, dtype=exact)
        above = q_BHSd.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        for b in range(batch):
            doc_ids_S = None if doc_ids_BS is None else doc_ids_BS[b]
            for first, end, key in _blocks(length, doc_ids_S):
                q, k, v = q_BHSd[b, :, first:end], k_BHSd[b, :, key:end], v_BHSv[b, :, key:end]
                scores = _masked_scores(q, k, scale, first, end, key, doc_ids_S, above)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True, dtype=exact)
                out_BHSv[b, :, first:end] = torch.bmm(weights, v) / total
                logsumexp_BHS[b, :, first:end] = (largest.to(exact) + total.log()).squeeze(-1)
        ctx.save_for_backward(q_BHSd, k_BHSd, v_BHSv, out_BHSv, logsumexp_BHS, doc_ids_BS)
        ctx.scale = scale
        return out_BHSv

    @staticmethod
    def backward(ctx, grad_BHSv):
        q_BHSd, k_BHSd, v_BHSv, out_BHSv, logsumexp_BHS, doc_ids_BS = ctx.saved_tensors
        dtype, exact = q_BHSd.dtype, logsumexp_BHS.dtype
        grad_q = torch.empty_like(q_BHSd)
        grad_k = torch.zeros_like(k_BHSd, dtype=exact)
        grad_v = torch.zeros_like(v_BHSv, dtype=exact)
        # Row sums of grad · out stand for the row sums of grad_weights · weights.
        row_sums_BHS = (grad_BHSv.to(exact) * out_BHSv.to(exact)).sum(-1)
        above = q_BHSd.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        for b in range(q_BHSd.shape[0]):
            doc_ids_S = None if doc_ids_BS is None else doc_ids_BS[b]
            for first, end, key in _blocks(q_BHSd.shape[2], doc_ids_S):
                q, k, v = q_BHSd[b, :, first:end], k_BHSd[b, :, key:end], v_BHSv[b, :, key:end]
                grad = grad_BHSv[b, :, first:end]
                scores = _masked_scores(q, k, ctx.scale, first, end, key, doc_ids_S, above)
                weights = scores.sub_(logsumexp_BHS[b, :, first:end, None].to(dtype)).exp_()
                grad_v[b, :, key:end] += torch.bmm(weights.transpose(1, 2), grad)
                grad_scores = torch.bmm(grad, v.transpose(1, 2)).sub_(row_sums_BHS[b, :, first:end, None].to(dtype))
                grad_scores.mul_(weights)
                grad_q[b, :, first:end] = torch.bmm(grad_scores, k).mul_(ctx.scale)
                grad_k[b, :, key:end] += torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q, grad_k.mul_(ctx.scale).to(dtype), grad_v.to(dtype), None, None


def attention(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels/reference/attention.py."""
    out: torch.Tensor = _Attention.apply(q_BHSd, k_BHSd, v_BHSv, scale, doc_ids_BS)
    return out
