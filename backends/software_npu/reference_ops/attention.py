"""Attention over packed documents: npu_fusion_attention and its gradient. Legend: T tokens, H heads, d and v widths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, gradients, unknown

COPIES = 8
"""Of each maximum and sum of a softmax in what the operator returns."""
UNUSED = {"gen_mask_parallel", "sync", "pre_tockens", "next_tockens", "inner_precise", "seed", "offset", "numels"}
"""Arguments that mean nothing without dropout, and in a causal mode."""
DEFAULTS: dict[str, Any] = {"keep_prob": 1.0, "softmax_layout": ""}


def _check(operator: str, layout: str, sparse_mode: int, mask: Tensor | None, others: dict[str, Any]) -> None:
    given = {key: value for key, value in others.items() if key not in UNUSED and value != DEFAULTS.get(key)}
    if layout != "TND" or sparse_mode != 3 or given:
        raise unknown(operator, f"input_layout={layout} sparse_mode={sparse_mode} {sorted(given)}")
    if mask is None or mask.shape != (2048, 2048) or not mask.equal(torch.ones_like(mask).triu(1)):
        raise unknown(operator, "atten_mask that is not the 2048 x 2048 upper triangle")


def _documents(query_ends: Sequence[int], key_ends: Sequence[int]) -> list[tuple[slice, slice]]:
    """Queries and keys of each document that has queries."""
    starts = zip([0, *query_ends[:-1]], [0, *key_ends[:-1]], strict=True)
    ends = zip(query_ends, key_ends, strict=True)
    spans = [(slice(q, q_end), slice(k, k_end)) for (q, k), (q_end, k_end) in zip(starts, ends, strict=True)]
    return [(rows, columns) for rows, columns in spans if rows.start < rows.stop]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[H, queries, keys] in FP32 or wider, -inf where a query may not look: the last one sees the last key."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = scale * q.to(exact).transpose(0, 1) @ k.to(exact).permute(1, 2, 0)
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return scores.masked_fill(hidden, float("-inf"))


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = _scores(q, k, scale).softmax(-1)
    return (weights @ v.to(weights.dtype).transpose(0, 1)).transpose(0, 1).to(q.dtype)


def fusion_attention(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THv: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    *rest: Any,
    **others: Any,
) -> tuple[Any, ...]:
    """[T, H, v], maxima and sums of the softmax [T, H, 8], and seed, offset and size of a dropout that there is not.

    `actual_seq_qlen`, `actual_seq_kvlen`: ends of the documents' queries and keys.
    """
    others |= {"pse": pse, "padding_mask": padding_mask, "prefix": prefix}
    _check("npu_fusion_attention", input_layout, sparse_mode, atten_mask, others | {"keep_prob": keep_prob})
    result = query_THd.new_zeros(*query_THd.shape[:2], value_THv.shape[-1])
    kept = torch.zeros(2, *query_THd.shape[:2], COPIES)
    for rows, columns in _documents(actual_seq_qlen or [], actual_seq_kvlen or []):
        q, k = query_THd[rows], key_THd[columns]
        result[rows] = _document(q, k, value_THv[columns], scale)
        scores = _scores(q, k, scale)
        peak = scores.amax(-1, keepdim=True)
        kept[0, rows] = peak.transpose(0, 1).float()
        kept[1, rows] = (scores - peak).exp().sum(-1, keepdim=True).transpose(0, 1).float()
    return result, kept[0], kept[1], query_THd.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THv: Tensor,
    dy_THv: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    scale_value: float = 1.0,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; those of position encoding and sink are empty."""
    _check("npu_fusion_attention_grad", input_layout, sparse_mode, atten_mask, others)
    given = [query_THd, key_THd, value_THv]
    found = [torch.zeros_like(x) for x in given]
    for rows, columns in _documents(actual_seq_qlen or [], actual_seq_kvlen or []):
        spans = [rows, columns, columns]
        parts = [x[span] for x, span in zip(given, spans, strict=True)]
        for into, span, gradient in zip(
            found, spans, gradients(lambda q, k, v: _document(q, k, v, scale_value), parts, dy_THv[rows]), strict=True
        ):
            into[span] = gradient
    return *found, query_THd.new_empty(0), torch.empty(0)


KERNELS: Kernels = {"npu_fusion_attention": fusion_attention, "npu_fusion_attention_grad": fusion_attention_grad}
