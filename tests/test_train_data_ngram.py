"""Byte n-gram baselines against dictionaries."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.train.data.ngram import BACKOFF_COUNT, ngram_cross_entropy


def by_dictionary(train, validation, order):
    counts = [Counter(train[i : i + n] for i in range(len(train) - n + 1)) for n in (1, 2, 3)]
    contexts = [None] + [Counter(train[i : i + n] for i in range(len(train) - n)) for n in (1, 2)]

    def probability(context, byte):
        if not context:
            return (counts[0][byte] + 1) / (len(train) + 256)
        n = len(context)
        lower = probability(context[1:], byte)
        return (counts[n][context + byte] + BACKOFF_COUNT * lower) / (contexts[n][context] + BACKOFF_COUNT)

    logs = [
        math.log(probability(validation[max(0, i - order) : i], validation[i : i + 1])) for i in range(len(validation))
    ]
    return -sum(logs) / len(logs)


@settings(max_examples=40, deadline=None)
@given(train=st.binary(max_size=60) | st.text("ab", max_size=60).map(str.encode), validation=st.binary(min_size=1))
def test_equals_dictionaries(train, validation):
    result = ngram_cross_entropy(train, validation)
    for order, name in enumerate(("unigram", "bigram", "trigram")):
        assert result[name] == pytest.approx(by_dictionary(train, validation, order), rel=1e-9)


def test_orders_improve_on_structured_text():
    result = ngram_cross_entropy(b"the cat sat on the mat. " * 200, b"the mat sat on the cat. " * 20)
    assert result["trigram"] < result["bigram"] < result["unigram"]


def test_empty_validation_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ngram_cross_entropy(b"abc", b"")
