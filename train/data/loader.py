"""Which samples a rank takes at each step: an order fixed by the seed alone, whatever ranks and workers there are."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.batch import IGNORED_LABEL, Batch
from octofold.train.data.dataset import PackedDataset
from octofold.train.data.skipping import LeftOut

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


@dataclass(frozen=True)
class _Step:
    """A step to come."""

    samples_AB: np.ndarray
    """Global samples of this rank's micro-batches."""
    end: int
    """The cursor after the step."""
    batches: list[Future[Batch]]


class Loader:
    """Micro-batches of one data rank, step after step, for ever.

    Global sample g of the run is sample `permute(g % N)` of epoch `g // N`. A step takes the next global samples that
    are not left out; of these, micro-batch m of rank r takes `(m*data_ranks + r)*micro_batch_size + [0,
    micro_batch_size)`: ranks are disjoint, and a step's samples are the same set for any number of ranks.
    A micro-batches a step, B sequences in each.
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
        self._ahead: deque[_Step] = deque()
        self._samples_seen = samples_seen
        self._left_out = LeftOut()
        self.samples_AB = np.empty((0, micro_batch_size), dtype=np.int64)
        """Global samples of the step last given out: those of this rank."""

    @property
    def samples_seen(self) -> int:
        """The global sample at which the next step begins: so many has the run passed, those left out included."""
        return self._samples_seen

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Ranges of global samples that are not given out: each the first, and the one behind the last."""
        return self._left_out.ranges

    def leave_out(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Never give out these global samples (again)."""
        self._cancel()
        for first, end in ranges:
            self._left_out.add(first, end)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if self._pool is None:
            self.samples_AB, self._samples_seen = self._step_samples(self._samples_seen)
            return [self._dataset.batch(indices) for indices in self._indices(self.samples_AB)]
        while len(self._ahead) <= _STEPS_AHEAD:
            samples_AB, end = self._step_samples(self._ahead[-1].end if self._ahead else self._samples_seen)
            batches = [self._pool.submit(self._dataset.batch, indices) for indices in self._indices(samples_AB)]
            self._ahead.append(_Step(samples_AB, end, batches))
        step = self._ahead.popleft()
        self.samples_AB, self._samples_seen = step.samples_AB, step.end
        return [future.result() for future in step.batches]

    def origin(self, sample: int) -> dict[str, Any]:
        """Where a global sample comes from: its number in the packed split, and its first and last document's."""
        index = int(self._indices(np.array([[sample]]))[0][0])
        return {"sample": sample, "packed_sample": index, "documents": self._dataset.documents(index)}

    def state_dict(self) -> dict:
        """The cursor, and what is left out, for a checkpoint (JSON)."""
        left_out = {"left_out": [list(pair) for pair in self.left_out]} if self.left_out else {}
        return {"samples_seen": self._samples_seen, **left_out}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved cursor; batch sizes and ranks may differ from those that saved it."""
        self._cancel()
        self._samples_seen = state["samples_seen"]
        self._left_out = LeftOut(state.get("left_out", []))

    def close(self) -> None:
        """Stop the workers."""
        self._cancel()
        if self._pool is not None:
            self._pool.shutdown()

    def _cancel(self) -> None:
        for future in (future for step in self._ahead for future in step.batches):
            future.cancel()
        self._ahead.clear()

    def _step_samples(self, start: int) -> tuple[np.ndarray, int]:
        """Global samples of this rank in the step that begins at `start`, int64 [A, B], and where the next begins."""
        samples, end = self._left_out.take(start, self._global)
        return samples.reshape(self._accumulation, self._ranks, self._micro)[:, self._rank], end

    def _indices(self, samples_AB: np.ndarray) -> list[np.ndarray]:
        """Their numbers in the packed split, by micro-batch."""
        if not self._shuffle:
            return list(samples_AB % len(self._dataset))
        epochs, positions = np.divmod(samples_AB, len(self._dataset))
        indices = np.empty_like(samples_AB)
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
