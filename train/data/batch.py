"""One micro-batch of token sequences, and how stored tokens become one.

Shape suffixes: B sequences, S tokens that the model sees, T = S + 1 tokens stored (one more, for the last label).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from octofold.parallel.sequence import positions_of

IGNORED_LABEL = -100
"""A label that counts for nothing: the `ignore_index` of torch's cross-entropy."""


@dataclass(frozen=True)
class Batch:
    """Sequences; all tensors are int64 of shape [B, S]."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    """The next token of each token, or `IGNORED_LABEL`."""
    positions_BS: torch.Tensor
    """Position in the sequence or, where documents are masked, in the part of the document that the sequence holds."""
    doc_ids_BS: torch.Tensor
    """Number of the document within the sequence: 0, 1, 2 …"""

    def ahead(self, depth: int, *, mask_documents: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """For multi-token prediction: the tokens `depth` places further on, and the tokens that follow those, [B, S].

        Made from whole sequences, before anything splits them along S. What lies beyond the sequence, or with
        `mask_documents` beyond the document, has an ignored label.
        """
        next_BS, steps = self.labels_BS, depth - 1
        # An ignored label hides its token; at such a place any token does, since no counted label depends on it.
        next_BS = torch.where(next_BS == IGNORED_LABEL, self.tokens_BS, next_BS)
        tokens_BS = torch.cat([next_BS[:, steps:], next_BS[:, :steps]], dim=1)
        labels_BS = torch.full_like(self.labels_BS, IGNORED_LABEL)
        kept = max(self.labels_BS.shape[1] - depth, 0)
        labels_BS[:, :kept] = self.labels_BS[:, depth:]
        if mask_documents:
            other_BS = self.doc_ids_BS[:, depth:] != self.doc_ids_BS[:, :kept]
            labels_BS[:, :kept][other_BS] = IGNORED_LABEL
        return tokens_BS, labels_BS

    def at_context(self, rank: int, ranks: int) -> "Batch":
        """The positions that a context rank holds, [B, Q] (parallel/sequence.py)."""
        return Batch(*(positions_of(getattr(self, field.name), rank, ranks) for field in fields(self)))

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def make_batch(tokens_BT: np.ndarray, documents_BT: np.ndarray, *, mask_documents: bool) -> Batch:
    """A batch from stored tokens and the number of the document that each belongs to.

    Args:
        tokens_BT: token ids, any integer dtype, [B, S + 1].
        documents_BT: integers [B, S + 1], rising by one where a document begins.
        mask_documents: restart positions in each document and ignore the label of a document's last token, whose
            next token belongs to another document.
    """
    tokens_BT = tokens_BT.astype(np.int64)
    labels_BS = tokens_BT[:, 1:].copy()
    positions_BS = np.broadcast_to(np.arange(labels_BS.shape[1]), labels_BS.shape)
    if mask_documents:
        ends_BS = documents_BT[:, 1:] != documents_BT[:, :-1]
        labels_BS[ends_BS] = IGNORED_LABEL
        starts_BS = np.zeros_like(labels_BS)
        starts_BS[:, 1:] = np.where(ends_BS[:, :-1], positions_BS[:, 1:], 0)
        positions_BS = positions_BS - np.maximum.accumulate(starts_BS, axis=1)
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BT[:, :-1].copy()),
        labels_BS=torch.from_numpy(labels_BS),
        positions_BS=torch.from_numpy(positions_BS.astype(np.int64)),
        doc_ids_BS=torch.from_numpy((documents_BT[:, :-1] - documents_BT[:, :1]).astype(np.int64)),
    )
