"""What a rank saw of a run that may have been continued: plain numbers and arrays, so that they travel. Torch-free."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Standing:
    """A run between two steps: all that a checkpoint of this moment holds."""

    tensors: Arrays
    """Unsplit, under their names in a checkpoint; those that this rank speaks for (train/layout/record.py)."""
    state: dict[str, Any]
    """What stands in the manifest: step, updates, loss scale, data cursor, placement of experts."""


@dataclass(frozen=True)
class Course:
    """The steps that one rank made in one life of a run."""

    rank: int
    data_rank: int
    """Ranks of the same number read the same sequences."""
    reports: dict[int, dict[str, Any]]
    """The `train` records of the metrics, by step."""
    samples: dict[int, list[list[int]]]
    """By step: digests of the sequences of each of this rank's micro-batches."""
    standings: dict[int, Standing]
    """By the number of steps made: where the run is continued, and its end."""
