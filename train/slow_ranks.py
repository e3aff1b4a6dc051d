"""Which ranks hold the others up: the time each computes, without what it waits for others in collectives.

A collective ends for all at about the same time, so that steps take all ranks equally long. The one that is slow is
the one that waits least.
"""

from statistics import median_low
from typing import Any

import torch

from octofold.backends.collectives import all_gather_stack, world

LEAST_EXCESS_S = 0.05
"""A step's difference to the others that is worth a word; below it the noise of an operating system is as large."""


def pace_metrics(compute_s: float, device: torch.device, *, stages: int, factor: float) -> dict[str, Any]:
    """`compute_s` and `slow_ranks` as the metrics name them; nothing for a rank alone. Collective over all ranks.

    Args:
        compute_s: of this rank, seconds a step.
        device: of the tensors that ranks exchange.
        stages: of the pipeline; each has a run of successive ranks.
        factor: a rank is slow that computes so many times as long as its stage's median.
    """
    if world().size() == 1:
        return {}
    own = torch.tensor([compute_s], dtype=torch.float64, device=device)
    seconds = all_gather_stack(own, world()).flatten().tolist()
    slow = slow_ranks(seconds, stages=stages, factor=factor)
    times = {"median": median_low(seconds), "slowest": max(seconds)}
    return {"compute_s": times, **({"slow_ranks": slow} if slow else {})}


def slow_ranks(seconds: list[float], *, stages: int, factor: float) -> dict[str, float]:
    """Rank -> how many times as long as the median of its stage it computes, of those that are slow.

    Ranks of one stage do the same work; the stages of a pipeline do not. Of two, the faster counts as the median.
    """
    if not factor:
        return {}
    each = len(seconds) // stages
    slow = {}
    for first in range(0, len(seconds), each):
        usual = median_low(seconds[first : first + each])
        for rank in range(first, first + each):
            if seconds[rank] > max(factor * usual, usual + LEAST_EXCESS_S):
                slow[str(rank)] = round(seconds[rank] / max(usual, 1e-6), 2)
    return slow
