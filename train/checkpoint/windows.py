"""A window of a tensor in a file as runs of bytes: what to read, and where it goes. Only arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

SLAB_BYTES = 8 * 2**20
"""How much is read at once, about; at least one row."""
LEAST_RUN_BYTES = 64 * 2**10
"""Shorter runs are read together with what lies between them."""


@dataclass(frozen=True)
class Piece:
    """Numbers that lie one after the other in the file."""

    first: int
    """Place of the first one, counted in numbers from the tensor's beginning."""
    shape: tuple[int, ...]
    """What they are read as: rows of the last dims."""
    inside: tuple[slice, ...]
    """What of that is wanted."""
    target: tuple[int | slice, ...]
    """Where that goes in the window."""


def is_run(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether all of a window lies together."""
    split = _first_split(shape, lengths)
    return all(length == 1 for length in lengths[:split])


def first_number(shape: Sequence[int], offsets: Sequence[int]) -> int:
    """Place of a number in a tensor, counted from the tensor's beginning."""
    place = 0
    for size, offset in zip(shape, offsets, strict=True):
        place = place * size + offset
    return place


def pieces(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], itemsize: int) -> Iterator[Piece]:
    """Pieces of about `SLAB_BYTES` that make up the window [offsets, offsets + lengths), in the order of the file.

    Args:
        shape: of the tensor in the file, at least one dim.
    """
    if not prod(lengths):
        return
    dim = _split_dim(shape, lengths, itemsize)
    row = prod(shape[dim + 1 :])
    rows = max(SLAB_BYTES // max(row * itemsize, 1), 1)
    crop = tuple(slice(o, o + n) for o, n in zip(offsets[dim + 1 :], lengths[dim + 1 :], strict=True))
    for outer in product(*(range(length) for length in lengths[:dim])):
        place = [offset + index for offset, index in zip(offsets, outer, strict=False)]
        for begin in range(0, lengths[dim], rows):
            count = min(rows, lengths[dim] - begin)
            first = first_number(shape, [*place, offsets[dim] + begin, *([0] * (len(shape) - dim - 1))])
            yield Piece(
                first, (count, *shape[dim + 1 :]), (slice(0, count), *crop), (*outer, slice(begin, begin + count))
            )


def _first_split(shape: Sequence[int], lengths: Sequence[int]) -> int:
    """The first dim behind which the window takes all of every dim."""
    dim = len(shape) - 1
    while dim > 0 and lengths[dim] == shape[dim]:
        dim -= 1
    return dim


def _split_dim(shape: Sequence[int], lengths: Sequence[int], itemsize: int) -> int:
    """The dim whose rows are read whole."""
    dim = _first_split(shape, lengths)
    while dim > 0 and lengths[dim] * prod(shape[dim + 1 :]) * itemsize < LEAST_RUN_BYTES:
        dim -= 1
    while dim < len(shape) - 1 and prod(shape[dim + 1 :]) * itemsize > SLAB_BYTES:
        dim += 1
    return dim
