"""What a rank saw of a run, step by step: plain numbers and arrays, so that they travel. Torch-free."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from octofold.backends.recording import Record

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class StepFacts:
    """One attempted update."""

    report: dict[str, Any]
    """The `train` record of the metrics: losses, gradient norm, expert loads, tokens."""
    gradients: Arrays
    """Unsplit and unscaled, before clipping, by parameter; those that this rank speaks for. Zero: none was computed."""
    loads: dict[int, np.ndarray]
    """Tokens that this rank alone routed to each expert, int64 [E], by layer."""
    biases: dict[int, np.ndarray]
    """The expert biases after the update, FP64 [E], by layer."""
    own_tokens: int
    """Labels that count, in the sequences that this rank read."""


@dataclass(frozen=True)
class RankFacts:
    """A run as one rank saw it."""

    rank: int
    steps: tuple[StepFacts, ...]
    weights: Arrays
    """Parameters after the last step, unsplit; those that this rank speaks for."""
    calls: "tuple[Record, ...]" = ()
    """The collectives of the steps, in order."""
