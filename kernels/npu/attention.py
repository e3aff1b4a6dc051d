"""Causal attention by npu_fusion_attention over packed documents (layout TND), with torch_npu's gradient.

B sequences, H heads, S positions, Q queries (of the last positions), d width of queries and keys, v width of values,
T tokens of all sequences together. The operator takes values narrower than keys (MLA: 192 and 128), up to 768 wide.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch._guards import detect_fake_mode
from torch.utils.weak import WeakIdKeyDictionary

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload

MASK = 2048
"""Side of the mask that the operator repeats over longer sequences."""
CAUSAL_TO_THE_LAST = 3
"""`sparse_mode`: the last query of a document sees its last key."""
DOCUMENTS = 1024
"""In one call, at most."""

Ends = tuple[list[int], list[int]]
"""Of each document the queries and the keys before its end, in all sequences one behind the other."""
_known_ends: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Document ids -> queries -> ends: all layers of a step share the ids, and reading them waits for the device."""


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16, FP16 and FP32."""
    return why_no_npu(workload)


@cache
def _above_diagonal(device: torch.device) -> torch.Tensor:
    # A tensor made in inference mode could not be kept for a backward pass.
    with torch.inference_mode(False):
        return torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu(1)


def _ends(doc_ids_BS: torch.Tensor | None, batch: int, queries: int, length: int) -> Ends:
    if doc_ids_BS is None:
        return [queries * (b + 1) for b in range(batch)], [length * (b + 1) for b in range(batch)]
    known: dict[int, Ends] = _known_ends.setdefault(doc_ids_BS, {})
    if queries not in known:
        known[queries] = _ends_of_documents(doc_ids_BS, queries)
    return known[queries]


def _ends_of_documents(doc_ids_BS: torch.Tensor, queries: int) -> Ends:
    ids_BS = doc_ids_BS.cpu()
    last_BS = F.pad(ids_BS[:, 1:] != ids_BS[:, :-1], (0, 1), value=True)
    sequence, position = last_BS.nonzero().unbind(1)
    length = ids_BS.shape[1]
    # A document that ends before the first query has keys and no queries.
    asked = (position + 1 - (length - queries)).clamp(min=0)
    return (sequence * queries + asked).tolist(), (sequence * length + position + 1).tolist()


def _packed(x_BHSd: torch.Tensor) -> torch.Tensor:
    """[T, H, d]."""
    return x_BHSd.transpose(1, 2).flatten(0, 1)


def attention(
    q_BHQd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    doc_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels/reference/attention.py."""
    batch, heads, queries, width = q_BHQd.shape
    if (missing := v_BHSv.shape[-1] - width) > 0:
        # The operator wants keys as wide as values, or wider; zero columns add nothing to the scores.
        q_BHQd, k_BHSd = F.pad(q_BHQd, (0, missing)), F.pad(k_BHSd, (0, missing))
    q_THd, k_THd, v_THv = _packed(q_BHQd), _packed(k_BHSd), _packed(v_BHSv)
    above = (_above_diagonal.__wrapped__ if detect_fake_mode(q_BHQd) else _above_diagonal)(q_BHQd.device)
    query_ends, key_ends = _ends(doc_ids_BS, batch, queries, k_BHSd.shape[2])
    parts, query, key = [], 0, 0
    for first in range(0, len(key_ends), DOCUMENTS):
        documents = slice(first, first + DOCUMENTS)
        q_end, k_end = query_ends[documents][-1], key_ends[documents][-1]
        if q_end > query:
            rows, columns = slice(query, q_end), slice(key, k_end)
            parts.append(
                torch.ops.npu.npu_fusion_attention(
                    q_THd[rows],
                    k_THd[columns],
                    v_THv[columns],
                    heads,
                    "TND",
                    atten_mask=above,
                    scale=scale,
                    actual_seq_qlen=[end - query for end in query_ends[documents]],
                    actual_seq_kvlen=[end - key for end in key_ends[documents]],
                    sparse_mode=CAUSAL_TO_THE_LAST,
                )[0]
            )
        query, key = q_end, k_end
    out_THv = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_THv.unflatten(0, (batch, queries)).transpose(1, 2)
