"""What simple byte models reach on the same split: the yardstick beside a model's validation loss."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from octofold.train.data.cache import write_json

if TYPE_CHECKING:
    from octofold.train.data.build import Data

ORDERS = ["unigram", "bigram", "trigram"]
BACKOFF_COUNT = 4.0
"""How many observations the lower order's estimate weighs in each context."""

_MAX_BYTES = 20_000_000


def ngram_cross_entropy(train_text: bytes, validation_text: bytes) -> dict[str, float]:
    """Cross-entropy of byte n-gram models counted on one text and evaluated on another, in nats a byte.

    p1(c) = (count(c) + 1) / (bytes + 256), and with the context h of the one or two bytes before c
    p(c | h) = (count(hc) + k p_lower(c)) / (count(h·) + k), k = `BACKOFF_COUNT`. The first bytes of the validation
    text, which lack a context, are scored by the order that they have.

    Raises:
        ValueError: the validation text is empty.
    """
    if not validation_text:
        raise ValueError("an empty text has no cross-entropy per byte")
    train = np.frombuffer(train_text, dtype=np.uint8).astype(np.int64)
    validation = np.frombuffer(validation_text, dtype=np.uint8).astype(np.int64)
    probabilities = (np.bincount(train, minlength=256)[validation] + 1) / (len(train) + 256)
    result = {"unigram": float(-np.log(probabilities).mean())}
    for context_bytes, order in enumerate(ORDERS[1:], start=1):
        counts = np.bincount(_grams(train, context_bytes + 1), minlength=256 ** (context_bytes + 1))
        totals = counts.reshape(-1, 256).sum(axis=1)
        grams = _grams(validation, context_bytes + 1)
        lower = probabilities[context_bytes:]
        higher = (counts[grams] + BACKOFF_COUNT * lower) / (totals[grams // 256] + BACKOFF_COUNT)
        probabilities = np.concatenate([probabilities[:context_bytes], higher])
        result[order] = float(-np.log(probabilities).mean())
    return result


def _grams(text: np.ndarray, n: int) -> np.ndarray:
    """Each run of n bytes as one number, [max(0, len - n + 1)]."""
    grams = np.zeros(max(0, len(text) - n + 1), dtype=np.int64)
    for i in range(n):
        grams = grams * 256 + text[i : i + len(grams)]
    return grams


def ngram_baselines(data: "Data") -> dict[str, float]:
    """`ngram_cross_entropy` of the data's splits, from its cache if it was computed before; {} without validation.

    Counts at most the first 20 MB of each split's text (documents end to end), whatever the tokenizer.
    """
    if data.validation is None:
        return {}
    if data.ngram_cache.exists():
        return json.loads(data.ngram_cache.read_text())
    result = ngram_cross_entropy(_head(data.texts("train")), _head(data.texts("validation")))
    write_json(data.ngram_cache, result)
    return result


def _head(texts: Iterator[str]) -> bytes:
    parts, size_bytes = [], 0
    for text in texts:
        parts.append(text.encode())
        size_bytes += len(parts[-1])
        if size_bytes >= _MAX_BYTES:
            break
    return b"".join(parts)[:_MAX_BYTES]
