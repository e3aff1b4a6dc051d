"""Which samples a rank takes at each step: an order fixed by the seed alone, whatever ranks and workers there are."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.batch import IGNORED_LABEL, Batch
from octofold.train.data.dataset import PackedDataset

_FEISTEL_ROUNDS = 8
_STEPS_AHEAD = 2


def permute(positions: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of range(n) sends these positions, without ever holding the permutation.

    A Feistel network permutes the smallest power of four that holds n; results outside range(n) are sent through
    it again until they fall inside (cycle walking), which keeps it a bijection.

    Args:
        positions: integers in [0, n), any shape.

    Returns:
        int64 of the same shape.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    key = _mix(np.array([(seed * 0x9E3779B97F4A7C15 + epoch) % 2**64], dtype=np.uint64))
    round_keys = _mix(key + np.arange(_FEISTEL_ROUNDS, dtype=np.uint64))
    result = np.array(positions, dtype=np.uint64).reshape(-1)
    outside = np.arange(result.size)
    while outside.size:
        left, right = result[outside] >> half_bits, result[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = (left << half_bits) | right
        outside = outside[result[outside] >= n]
    return result.astype(np.int64).reshape(np.shape(positions))


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every output bit depends on every input bit. uint64 arrays, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def micro_batches_per_step(*, global_batch_size: int, micro_batch_size: int, data_ranks: int) -> int:
    """Micro-batches that a rank computes in a step.

    Raises:
        ConfigError: the global batch is no multiple of micro batch times ranks.
    """
    share = micro_batch_size * data_ranks
    if global_batch_size % share:
        shown = f"global_batch_size={global_batch_size} micro_batch_size={micro_batch_size} data ranks={data_ranks}"
        rule = f"the global batch must be a multiple of micro batch x data ranks = {share} sequences"
        remedy = f"train.global_batch_size={max(share, global_batch_size // share * share)}"
        raise ConfigError("train.global_batch_size", shown, rule, remedy)
    return global_batch_size // share


class Loader:
    """Micro-batches of one data rank, step after step, for ever.

    Global sample g of the run is sample `permute(g % N)` of epoch `g // N`. Micro-batch m of rank r takes the global
    samples `step_start + (m*data_ranks + r)*micro_batch_size + [0, micro_batch_size)`: ranks are disjoint, and a
    step's samples are the same set for any number of ranks.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        seed: int,
        shuffle: bool,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
        workers: int,
        samples_seen: int = 0,
    ) -> None:
        """
        Args:
            workers: threads that prepare coming steps; 0 prepares each when it is asked for. The order is the same.
            samples_seen: the cursor, in sequences of the whole run.

        Raises:
            UserError: the dataset is empty or the batch sizes do not divide.
        """
        if not len(dataset):
            raise UserError("the training split holds no whole sequence; give more text or a shorter sequence_length")
        self._accumulation = micro_batches_per_step(
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, data_ranks=data_ranks
        )
        self._dataset, self._seed, self._shuffle = dataset, seed, shuffle
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._ranks = data_rank, data_ranks
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="octofold-data") if workers else None
        self._ahead: deque[list[Future[Batch]]] = deque()
        self._samples_seen = samples_seen

    @property
    def samples_seen(self) -> int:
        """Sequences that all ranks together have been given."""
        return self._samples_seen

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if self._pool is None:
            batches = [self._dataset.batch(indices) for indices in self._step_indices(self._samples_seen)]
        else:
            while len(self._ahead) <= _STEPS_AHEAD:
                start = self._samples_seen + len(self._ahead) * self._global
                self._ahead.append([self._pool.submit(self._dataset.batch, i) for i in self._step_indices(start)])
            batches = [future.result() for future in self._ahead.popleft()]
        self._samples_seen += self._global
        return batches

    def state_dict(self) -> dict:
        """The cursor, for a checkpoint (JSON)."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved cursor; batch sizes and ranks may differ from those that saved it."""
        self._cancel()
        self._samples_seen = state["samples_seen"]

    def close(self) -> None:
        """Stop the workers."""
        self._cancel()
        if self._pool is not None:
            self._pool.shutdown()

    def _cancel(self) -> None:
        for future in (future for step in self._ahead for future in step):
            future.cancel()
        self._ahead.clear()

    def _step_indices(self, step_start: int) -> list[np.ndarray]:
        """Sample indices of each micro-batch of the step that begins at this global sample."""
        micros = np.arange(self._accumulation)[:, None] * self._ranks + self._rank
        samples = step_start + micros * self._micro + np.arange(self._micro)
        if not self._shuffle:
            return list(samples % len(self._dataset))
        epochs, positions = np.divmod(samples, len(self._dataset))
        indices = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permute(positions[chosen], len(self._dataset), seed=self._seed, epoch=int(epoch))
        return list(indices)


def validation_batches(
    dataset: PackedDataset, *, sequences: int, micro_batch_size: int, data_rank: int, data_ranks: int
) -> Iterator[Batch]:
    """This rank's share of the first `sequences` samples, in batches of one size and, on every rank, of one number.

    Where they do not divide, samples are repeated with every label ignored, so that ranks issue equal collectives
    and a sum over counted labels is not disturbed.
    """
    sequences = min(sequences, len(dataset))
    stride = micro_batch_size * data_ranks
    for start in range(0, sequences, stride):
        samples = start + data_rank * micro_batch_size + np.arange(micro_batch_size)
        batch = dataset.batch(samples % sequences)
        batch.labels_BS[torch.from_numpy(samples >= sequences)] = IGNORED_LABEL
        yield batch
