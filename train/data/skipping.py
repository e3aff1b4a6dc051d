"""Which global samples a step takes where a run leaves some out (train/anomaly/). Torch-free."""

from collections.abc import Iterable

import numpy as np


class LeftOut:
    """Global samples that are never given out: sorted ranges that neither overlap nor touch."""

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        """`ranges`: pairs of the first sample and the one behind the last, in any order."""
        self.ranges: list[tuple[int, int]] = []
        for first, end in ranges:
            self.add(first, end)

    def add(self, first: int, end: int) -> None:
        """Leave out `first` … `end` − 1 too."""
        assert 0 <= first < end, (first, end)
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.ranges, (first, end)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.ranges = merged

    def __contains__(self, sample: int) -> bool:
        return any(first <= sample < end for first, end in self.ranges)

    def take(self, start: int, count: int) -> tuple[np.ndarray, int]:
        """The next `count` samples from `start` on that are not left out, int64, and where to go on from."""
        parts, at, wanted = [], start, count
        for first, end in [*self.ranges, (None, None)]:
            if end is not None and end <= at:
                continue
            room = wanted if first is None else min(wanted, max(first - at, 0))
            parts.append(np.arange(at, at + room, dtype=np.int64))
            at, wanted = at + room, wanted - room
            if not wanted:
                break
            assert end is not None
            at = end
        return np.concatenate(parts), at
