"""Packed sequences: tokens, labels, positions and document ids, on an example made by hand and against a loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.train.data.dataset import PackedDataset

EOS = 9
# Documents 1 2 3, 4, 5 6 7 8, each followed by EOS; five tokens a sequence.
TOKENS = np.array([1, 2, 3, EOS, 4, EOS, 5, 6, 7, 8, EOS], dtype=np.uint16)
OFFSETS = np.array([0, 4, 6, 11])


def packed(mask_documents):
    return PackedDataset(TOKENS, OFFSETS, sequence_length=5, mask_documents=mask_documents, text_bytes=16)


def test_masked_example():
    batch = packed(True).batch(np.array([0, 1]))
    assert batch.tokens_BS.tolist() == [[1, 2, 3, EOS, 4], [EOS, 5, 6, 7, 8]]
    # The last label of the second sequence is the EOS itself, which counts.
    assert batch.labels_BS.tolist() == [[2, 3, EOS, -100, EOS], [-100, 6, 7, 8, EOS]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 0], [0, 0, 1, 2, 3]]
    assert batch.doc_ids_BS.tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]
    for tensor in vars(batch).values():
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_unmasked_example():
    batch = packed(False).batch(np.array([1, 0]))
    assert batch.tokens_BS.tolist() == [[EOS, 5, 6, 7, 8], [1, 2, 3, EOS, 4]]
    assert batch.labels_BS.tolist() == [[5, 6, 7, 8, EOS], [2, 3, EOS, 4, EOS]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.doc_ids_BS.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]


def test_sizes_and_bounds():
    dataset = packed(True)
    assert len(dataset) == 2
    assert dataset.bytes_per_token == pytest.approx(16 / 11)
    for index in (2, -1):
        with pytest.raises(IndexError, match="2 sequences"):
            dataset.batch(np.array([index]))
    short = PackedDataset(TOKENS[:5], OFFSETS, sequence_length=5, mask_documents=True, text_bytes=5)
    assert len(short) == 0


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=12), sequence_length=st.integers(2, 6))
def test_against_a_loop(lengths, sequence_length):
    documents = [[10 * d + i for i in range(n)] + [EOS] for d, n in enumerate(lengths)]
    stream = [(token, d) for d, document in enumerate(documents) for token in document]
    dataset = PackedDataset(
        np.array([token for token, _ in stream]),
        np.cumsum([0, *map(len, documents)]),
        sequence_length=sequence_length,
        mask_documents=True,
        text_bytes=1,
    )
    for index in range(len(dataset)):
        piece = stream[index * sequence_length :][: sequence_length + 1]
        batch = dataset.batch(np.array([index]))
        position = -1
        for s in range(sequence_length):
            (token, document), (following, next_document) = piece[s], piece[s + 1]
            position = 0 if s and piece[s - 1][1] != document else position + 1
            assert batch.tokens_BS[0, s] == token
            assert batch.labels_BS[0, s] == (following if document == next_document else -100)
            assert batch.positions_BS[0, s] == position
            assert batch.doc_ids_BS[0, s] == document - piece[0][1]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    sequence_length=st.integers(1, 8),
    depth=st.integers(1, 4),
    masked=st.booleans(),
)
def test_tokens_and_labels_further_ahead(lengths, sequence_length, depth, masked):
    documents = [[10 * d + i for i in range(n)] + [EOS] for d, n in enumerate(lengths)]
    stream = [(token, d if masked else 0) for d, document in enumerate(documents) for token in document]
    dataset = PackedDataset(
        np.array([token for token, _ in stream]),
        np.cumsum([0, *map(len, documents)]),
        sequence_length=sequence_length,
        mask_documents=masked,
        text_bytes=1,
    )
    for index in range(len(dataset)):
        piece = stream[index * sequence_length :][: sequence_length + 1]
        tokens_BS, labels_BS = dataset.batch(np.array([index])).ahead(depth, mask_documents=masked)
        assert tokens_BS.shape == labels_BS.shape == (1, sequence_length)
        for s, (_, document) in enumerate(piece[:-1]):
            token, label = (piece[s + d] if s + d < len(piece) else (-100, None) for d in (depth, depth + 1))
            assert labels_BS[0, s] == (label[0] if label[1] == document else -100)
            if token[1] == document:
                assert tokens_BS[0, s] == token[0]
            assert tokens_BS[0, s] >= 0
