"""Does FP8 train like BF16? The statistics behind the answer, from loss curves on the same batches. Torch-free.

Of a pair of runs, the statistic is the relative error of the smoothed loss, (FP8 - BF16) / BF16, averaged over the
second half of the steps: runs that begin with the same weights cannot differ at first. Both losses are smoothed by an
exponential moving average, as in DeepSeek-V3, appendix B.1. Pairing by batch removes what the batches contribute.

What is left is correlated from step to step: rounding sends two runs on different ways, which part and meet slowly. So
the mean's uncertainty comes from the means of blocks, each longer than the smoothing remembers, widened by what
correlation is left between neighbouring blocks; blocks of several seeds are put together. The interval is two-sided,
95%: a loss that is too low says as much as one that is too high that FP8 does not train like BF16.

The noise floor is the same statistic of two BF16 runs that differ in rounding only: how far its interval reaches.

    yes            the interval lies within ±bar, and so does the noise floor
    no             the interval lies beyond ±bar and beyond the noise floor, or FP8's loss is not finite
    inconclusive   anything else
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
SETTLING_SHARE = 1 / 2
"""Of the steps, from the first, that are not counted."""
MOST_BLOCKS, LEAST_BLOCKS = 16, 8
"""Of a seed; of all seeds together."""
MOST_CORRELATION = 0.85
"""Of neighbouring blocks: where more is found, the difference moves too slowly for the length of the run."""

Answer = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True)
class Curves:
    """Losses step by step of the runs of one seed, which saw the same batches."""

    fp8: np.ndarray
    """Shorter than the others where the run broke off."""
    bf16: np.ndarray
    bf16_again: np.ndarray
    """BF16 too, rounded otherwise."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, both relative to the BF16 loss."""

    mean: float
    half_width: float

    @property
    def reach(self) -> float:
        """How far from zero the interval extends."""
        return abs(self.mean) + self.half_width

    @property
    def gap(self) -> float:
        """How far from zero it begins; negative where it holds zero."""
        return abs(self.mean) - self.half_width


@dataclass(frozen=True)
class Verdict:
    """An answer and what it rests on."""

    answer: Answer
    reason: str
    steps: int
    """Of each run."""
    seeds: int
    error: Interval | None
    """FP8 against BF16; None where the runs are too short or not finite."""
    floor: Interval | None
    """BF16 against BF16; its `reach` is the noise floor."""


def judge(seeds: Sequence[Curves], *, bar: float, smoothing: float) -> Verdict:
    """The verdict on the curves of one or more seeds, all of the same number of steps.

    Args:
        bar: the relative error allowed, such as 0.0025.
        smoothing: coefficient of the moving average, in [0, 1).

    Raises:
        ValueError: a BF16 loss is not finite, so that there is nothing to compare with.
    """
    steps = len(seeds[0].bf16)
    if not all(np.isfinite(losses).all() for of_seed in seeds for losses in (of_seed.bf16, of_seed.bf16_again)):
        raise ValueError("a loss of a BF16 run is not finite")
    unknown: tuple[int, int, None, None] = (steps, len(seeds), None, None)
    broken = sum(int((~np.isfinite(of_seed.fp8)).sum()) for of_seed in seeds)
    if broken:
        return Verdict("no", f"FP8's loss is not finite at {broken} step(s); BF16's always is", *unknown)
    if all(np.array_equal(of_seed.bf16, of_seed.bf16_again) for of_seed in seeds):
        return Verdict(
            "inconclusive", "the two BF16 runs rounded alike, which leaves the noise floor unknown", *unknown
        )
    if steps < (needed := least_steps(smoothing, len(seeds))):
        reason = f"{steps} steps are too few to tell; verify.steps={needed} at least would"
        return Verdict("inconclusive", reason, *unknown)
    error = interval([relative_error(of_seed.fp8, of_seed.bf16, smoothing) for of_seed in seeds], smoothing)
    floor = interval([relative_error(of_seed.bf16_again, of_seed.bf16, smoothing) for of_seed in seeds], smoothing)
    answer, reason = _answer(error, floor, bar, steps, len(seeds))
    return Verdict(answer, reason, steps, len(seeds), error, floor)


def smooth(losses: np.ndarray, coefficient: float) -> np.ndarray:
    """Exponential moving average without a bias towards its start; `coefficient` is the weight of the past."""
    out, mean, weight = np.empty(len(losses)), 0.0, 0.0
    for step, loss in enumerate(losses):
        mean = coefficient * mean + (1 - coefficient) * loss
        weight = coefficient * weight + (1 - coefficient)
        out[step] = mean / weight
    return out


def relative_error(losses: np.ndarray, baseline: np.ndarray, smoothing: float) -> np.ndarray:
    """(smoothed loss - smoothed baseline) / smoothed baseline, step by step."""
    smooth_baseline = smooth(baseline, smoothing)
    return (smooth(losses, smoothing) - smooth_baseline) / smooth_baseline


def least_steps(smoothing: float, seeds: int) -> int:
    """Steps below which no interval is computed."""
    blocks = -(-LEAST_BLOCKS // seeds)
    return math.ceil(max(blocks, 2) * _memory_steps(smoothing) / (1 - SETTLING_SHARE))


def counted(curve: np.ndarray) -> np.ndarray:
    """The part of a curve that the statistic is about."""
    return curve[math.floor(len(curve) * SETTLING_SHARE) :]


def interval(curves: Sequence[np.ndarray], smoothing: float) -> Interval:
    """The mean over the counted steps of all curves (one a seed), with its confidence interval."""
    blocks = min(MOST_BLOCKS, len(counted(curves[0])) // _memory_steps(smoothing))
    means_SB = np.array([[block.mean() for block in np.array_split(counted(curve), blocks)] for curve in curves])
    number, deviations_SB = means_SB.size, means_SB - means_SB.mean()
    variance = float((deviations_SB**2).sum()) / (number - 1)
    correlation = _correlation(deviations_SB)
    # A sum of numbers whose neighbours correlate by r varies as that of (1 - r) / (1 + r) times as many.
    effective = number * (1 - correlation) / (1 + correlation)
    return Interval(float(means_SB.mean()), t_quantile(max(effective - 1, 2)) * math.sqrt(variance / effective))


def _correlation(deviations_SB: np.ndarray) -> float:
    """Of neighbouring blocks of a seed, from 0 to `MOST_CORRELATION`."""
    variance = float((deviations_SB**2).mean())
    if variance == 0:
        return 0.0
    found = float((deviations_SB[:, 1:] * deviations_SB[:, :-1]).mean()) / variance
    # Deviations from a mean that is estimated too make it too small: by 1/n, and by half of (1 + 3r)/n besides.
    number = deviations_SB.size
    found += 1 / number
    found += (1 + 3 * found) / (2 * number)
    return min(max(found, 0.0), MOST_CORRELATION)


def _memory_steps(smoothing: float) -> int:
    """Steps that a moving average of this coefficient averages over."""
    return max(1, round(2 / (1 - smoothing)))


def t_quantile(degrees: float) -> float:
    """Student's t that |t| stays below with probability `CONFIDENCE` (Abramowitz and Stegun 26.7.5; within 3%)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _answer(error: Interval, floor: Interval, bar: float, steps: int, seeds: int) -> tuple[Answer, str]:
    found = f"relative error {error.mean:+.3%} ± {error.half_width:.3%}"
    if error.reach <= bar and floor.reach <= bar:
        return "yes", f"{found} lies within ±{bar:.2%}, and so does the noise floor, {floor.reach:.3%}"
    if error.gap > max(bar, floor.reach):
        return "no", f"{found} lies beyond ±{bar:.2%} and beyond the noise floor, {floor.reach:.3%}"
    if floor.reach > bar:
        why = f"two BF16 runs differ by up to {floor.reach:.3%} (noise floor), more than the bar of {bar:.2%}"
    else:
        why = f"{found} reaches over the bar of {bar:.2%}"
    return "inconclusive", f"{why}; {_remedy(_more(error, floor, bar), steps, seeds)}"


def _more(error: Interval, floor: Interval, bar: float) -> float:
    """How many times as long the runs would have to be: an interval narrows with the root of its length."""
    # A mean inside its own interval may be zero; the floor's is zero by its making.
    distance = bar if error.gap < 0 else abs(abs(error.mean) - bar)
    width = error.reach if error.gap < 0 else error.half_width
    return max((width / distance) ** 2 if distance else math.inf, (floor.reach / bar) ** 2, 1.1)


def _remedy(more: float, steps: int, seeds: int) -> str:
    if more > 100:
        return "no affordable length would tell: the difference lies at the bar, or the noise far above it"
    return f"about verify.steps={_two_digits(steps * more)} or verify.seeds={math.ceil(seeds * more)} would tell"


def _two_digits(number: float) -> int:
    """Rounded up to two digits: more would claim to know."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
