"""Documents packed end to end and cut into sequences of one length.

Shape suffixes: B sequences, S tokens that the model sees, T = S + 1 tokens stored (one more, for the last label).
"""

import numpy as np

from octofold.train.data.batch import Batch, make_batch


class PackedDataset:
    """Sample i is `tokens[i*S : i*S + S + 1]` of the documents of a split, each followed by its EOS."""

    def __init__(
        self,
        tokens: np.ndarray,
        doc_offsets: np.ndarray,
        *,
        sequence_length: int,
        mask_documents: bool,
        text_bytes: int,
    ) -> None:
        """
        Args:
            tokens: all tokens of the split, one-dimensional, any integer dtype; may be a memory map.
            doc_offsets: int64 [documents + 1], where each document begins, then the number of tokens.
            sequence_length: S, the tokens that the model sees.
            mask_documents: see `make_batch`.
            text_bytes: length of the documents' text in UTF-8.
        """
        self.tokens, self.doc_offsets = tokens, doc_offsets
        self.sequence_length, self.mask_documents, self.text_bytes = sequence_length, mask_documents, text_bytes

    def __len__(self) -> int:
        """The number of whole sequences."""
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token; an EOS is a token of zero bytes."""
        return self.text_bytes / len(self.tokens)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples of these indices (integers [B], each below `len(self)`), in their order."""
        starts_B = np.asarray(indices, dtype=np.int64) * self.sequence_length
        if len(starts_B) and (starts_B.min() < 0 or starts_B.max() + self.sequence_length >= len(self.tokens)):
            raise IndexError(f"sample {indices} of a dataset of {len(self)} sequences")
        places_BT = starts_B[:, None] + np.arange(self.sequence_length + 1)
        documents_BT = np.searchsorted(self.doc_offsets, places_BT, side="right") - 1
        return make_batch(np.asarray(self.tokens[places_BT]), documents_BT, mask_documents=self.mask_documents)

    def documents(self, index: int) -> list[int]:
        """The numbers in the split of the first and the last document of a sample."""
        first = index * self.sequence_length
        places = np.array([first, first + self.sequence_length - 1])
        return (np.searchsorted(self.doc_offsets, places, side="right") - 1).tolist()
