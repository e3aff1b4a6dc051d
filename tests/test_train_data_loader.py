"""The order of samples: a permutation each epoch, disjoint over ranks, one order for all layouts, resumable."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.batch import IGNORED_LABEL
from octofold.train.data.dataset import PackedDataset
from octofold.train.data.loader import Loader, permute, validation_batches
from octofold.train.data.skipping import LeftOut

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


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=5),
    start=st.integers(0, 60),
    count=st.integers(1, 40),
)
def test_samples_are_left_out_wherever_they_lie(ranges, start, count):
    left_out = LeftOut((first, first + size) for first, size in ranges)
    never = {sample for first, size in ranges for sample in range(first, first + size)}
    expected = [sample for sample in range(start, 200) if sample not in never][:count]
    taken, end = left_out.take(start, count)
    assert taken.tolist() == expected
    assert expected[-1] < end == left_out.take(end, 1)[0][0] or end == expected[-1] + 1
    assert [sample for sample in range(80) if sample in left_out] == sorted(never)
    assert LeftOut(left_out.ranges).ranges == left_out.ranges


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_comes_no_more_on_any_layout(workers):
    """Two steps, then the second's batch is left out: what follows is the order without it, resumed or not."""
    whole = run(loader(40, shuffle=False), 5)
    for ranks in (1, 2):
        orders = []
        for rank in range(ranks):
            first = loader(40, rank=rank, ranks=ranks, workers=workers, shuffle=False)
            for _ in range(2):
                first.next_step()
            first.load_state_dict({"samples_seen": 0})
            first.leave_out([(8, 16)])
            first.next_step()
            state = json.loads(json.dumps(first.state_dict()))
            resumed = loader(40, rank=rank, ranks=ranks, workers=workers, shuffle=False)
            resumed.load_state_dict(state)
            assert resumed.left_out == [(8, 16)]
            orders.append((run(first, 2), run(resumed, 2)))
            assert first.samples_AB.tolist() == resumed.samples_AB.tolist()
            assert first.samples_AB.flatten().tolist() == orders[-1][0][-1], "unshuffled: a sample is its own number"
        for going_on, resumed_order in orders:
            assert going_on == resumed_order
        merged = [sorted(s for order, _ in orders for s in order[step]) for step in range(2)]
        assert merged == [sorted(whole[2]), sorted(whole[3])]


def test_a_sample_knows_where_it_comes_from():
    tokens, offsets = np.arange(41), np.array([0, 5, 6, 41])
    dataset = PackedDataset(tokens, offsets, sequence_length=4, mask_documents=False, text_bytes=1)
    choices = {"global_batch_size": 2, "micro_batch_size": 1, "data_rank": 0, "data_ranks": 1, "workers": 0}
    unshuffled = Loader(dataset, seed=0, shuffle=False, **choices)
    assert unshuffled.origin(1) == {"sample": 1, "packed_sample": 1, "documents": [0, 2]}
    assert unshuffled.origin(12) == {"sample": 12, "packed_sample": 2, "documents": [2, 2]}
    shuffled = Loader(dataset, seed=0, shuffle=True, **choices)
    batches = shuffled.next_step()
    for sample, batch in zip(shuffled.samples_AB.flatten().tolist(), batches, strict=True):
        assert shuffled.origin(sample)["packed_sample"] * 4 == int(batch.tokens_BS[0, 0])
