"""The order of samples: a permutation each epoch, disjoint over ranks, one order for all layouts, resumable."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.batch import IGNORED_LABEL
from octofold.train.data.dataset import PackedDataset
from octofold.train.data.loader import Loader, permute, validation_batches

S = 2


def numbered(n):
    """A dataset of n samples in which sample i begins with token 2i."""
    tokens = np.arange(n * S + 1)
    offsets = np.array([0, len(tokens)])
    return PackedDataset(tokens, offsets, sequence_length=S, mask_documents=False, text_bytes=1)


def loader(n, *, rank=0, ranks=1, workers=0, seed=0, shuffle=True, batch=8, micro=2, seen=0):
    return Loader(
        numbered(n),
        seed=seed,
        shuffle=shuffle,
        global_batch_size=batch,
        micro_batch_size=micro,
        data_rank=rank,
        data_ranks=ranks,
        workers=workers,
        samples_seen=seen,
    )


def samples(batches):
    return [int(first) // S for batch in batches for first in batch.tokens_BS[:, 0]]


def run(loader, steps):
    taken = [samples(loader.next_step()) for _ in range(steps)]
    loader.close()
    return taken


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(-5, 2**40), epoch=st.integers(0, 1000))
def test_permutation_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed=seed, epoch=epoch)) == list(range(n))


def test_permutation_mixes_and_scales():
    n = 10**5
    first, second = (permute(np.arange(n), n, seed=0, epoch=epoch) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(np.diff(first), np.diff(second))[0, 1]) < 0.02
    large = permute(np.arange(1000).reshape(10, 100), 10**12, seed=1, epoch=0)
    assert large.shape == (10, 100)
    assert len(np.unique(large)) == 1000
    assert 0 <= large.min() < large.max() < 10**12


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
)
def test_ranks_share_one_global_order(n, micro, accumulation, seed, shuffle):
    """For 1, 2 and 4 ranks: the same samples in the same global order, each once, an epoch holding every sample."""
    batch = 4 * micro * accumulation
    steps = -(-2 * n // batch)
    orders = []
    for ranks in (1, 2, 4):
        rounds = []
        per_rank = [
            run(loader(n, rank=r, ranks=ranks, seed=seed, shuffle=shuffle, batch=batch, micro=micro), steps)
            for r in range(ranks)
        ]
        for step in range(steps):
            micros = batch // micro // ranks
            rounds += [
                sample
                for m in range(micros)
                for r in range(ranks)
                for sample in per_rank[r][step][m * micro : (m + 1) * micro]
            ]
        orders.append(rounds)
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0][:n]) == sorted(orders[0][n : 2 * n]) == list(range(n))
    if not shuffle:
        assert orders[0][:n] == list(range(n))


def test_epochs_and_seeds_differ():
    (one_epoch,) = run(loader(64, batch=128), 1)
    assert one_epoch[:64] != one_epoch[64:]
    assert run(loader(64, batch=64, seed=1), 1) != run(loader(64, batch=64, seed=2), 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_order(workers):
    assert run(loader(37, rank=1, ranks=2, workers=workers), 12) == run(loader(37, rank=1, ranks=2), 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_cursor(workers):
    whole = run(loader(37), 10)
    first = loader(37, workers=workers)
    assert [samples(first.next_step()) for _ in range(4)] == whole[:4]
    state = first.state_dict()
    assert state == {"samples_seen": 32}
    assert first.samples_seen == 32
    assert run(loader(37, workers=workers, seen=32), 6) == whole[4:]
    # Back in time, with prepared steps to throw away.
    first.next_step()
    first.load_state_dict(state)
    assert run(first, 6) == whole[4:]


def test_another_number_of_ranks_continues_the_order():
    whole = run(loader(37), 6)
    resumed = [run(loader(37, rank=r, ranks=2, seen=24), 3) for r in range(2)]
    for step in range(3):
        assert sorted(resumed[0][step] + resumed[1][step]) == sorted(whole[3 + step])


def test_refusals():
    with pytest.raises(ConfigError, match="multiple of micro batch x data ranks = 6"):
        loader(10, ranks=3)
    with pytest.raises(UserError, match="no whole sequence"):
        loader(0)


@pytest.mark.parametrize(("sequences", "ranks"), [(10, 1), (10, 2), (7, 2), (1, 4), (99, 3)])
def test_validation_batches(sequences, ranks):
    dataset = numbered(12)
    expected = min(sequences, 12)
    per_rank = [
        list(validation_batches(dataset, sequences=sequences, micro_batch_size=2, data_rank=r, data_ranks=ranks))
        for r in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = []
    for batch in (batch for batches in per_rank for batch in batches):
        assert batch.tokens_BS.shape == (2, S)
        for tokens_S, labels_S in zip(batch.tokens_BS, batch.labels_BS, strict=True):
            if torch.all(labels_S == IGNORED_LABEL):
                continue
            assert torch.equal(labels_S, tokens_S + 1)
            counted.append(int(tokens_S[0]) // S)
    assert sorted(counted) == list(range(expected))
