"""The picture of a precision verification: loss curves, and below them the relative error, the bar, the noise floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octofold.launch.report_plots import BLUE, DOTS_PER_INCH, GREEN, GREY, RED
from octofold.train.precision.verdict import Curves, Verdict, counted, relative_error, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_ERROR = 6.0
"""Bars (or noise floors) that the relative error's axis extends to, at most."""


def draw(seeds: Sequence[Curves], verdict: Verdict, *, bar: float, smoothing: float, title: str, path: Path) -> None:
    """Write the picture as a PNG file.

    Args:
        seeds: the curves that the verdict is about.
        bar, smoothing: see `octofold.train.precision.verdict.judge`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontweight="bold", x=0.01, ha="left", parse_math=False)
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_losses(above, seeds, smoothing)
    _draw_errors(below, seeds, verdict, bar, smoothing)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_losses(axes: "Axes", seeds: Sequence[Curves], smoothing: float) -> None:
    axes.set_title(f"Training loss (moving average, {smoothing:g})", loc="left", fontsize=10)
    axes.set_ylabel("loss (nats/token)")
    for number, of_seed in enumerate(seeds):
        for name, losses, colour in (
            ("BF16", of_seed.bf16, BLUE),
            ("BF16, rounded otherwise", of_seed.bf16_again, GREEN),
            ("FP8", of_seed.fp8, RED),
        ):
            label = name if number == 0 else None
            axes.plot(_steps(losses), smooth(losses, smoothing), color=colour, linewidth=1.2, label=label)


def _draw_errors(axes: "Axes", seeds: Sequence[Curves], verdict: Verdict, bar: float, smoothing: float) -> None:
    axes.set_title("Relative error of the smoothed loss", loc="left", fontsize=10)
    axes.set_xlabel("training step")
    axes.set_ylabel("% of the BF16 loss")
    steps = verdict.steps
    first = steps - len(counted(np.empty(steps))) + 1
    axes.axvspan(first, steps, color=GREY, alpha=0.06, label=f"counted: steps {first} to {steps}")
    for sign in (-1, 1):
        axes.axhline(100 * sign * bar, color="black", linestyle="--", linewidth=1, label=_once(sign, f"bar ±{bar:.2%}"))
    for number, of_seed in enumerate(seeds):
        for name, losses, colour in (("BF16 - BF16", of_seed.bf16_again, GREEN), ("FP8 - BF16", of_seed.fp8, RED)):
            error = 100 * relative_error(losses, of_seed.bf16[: len(losses)], smoothing)
            axes.plot(_steps(losses), error, color=colour, linewidth=1, label=name if number == 0 else None)
    reach = bar
    if verdict.error is not None and verdict.floor is not None:
        reach = max(bar, verdict.floor.reach, verdict.error.reach)
        floor, mean, half = (100 * x for x in (verdict.floor.reach, verdict.error.mean, verdict.error.half_width))
        axes.fill_between([first, steps], -floor, floor, color=GREEN, alpha=0.15, label=f"noise floor ±{floor:.3f}%")
        axes.fill_between([first, steps], mean - half, mean + half, color=RED, alpha=0.15)
        axes.hlines(mean, first, steps, color=RED, linewidth=2, label=f"mean {mean:+.3f}% ± {half:.3f}%")
    # A spike must not flatten what the verdict is about.
    limit = 100 * SHOWN_ERROR * reach
    axes.set_ylim(max(axes.get_ylim()[0], -limit), min(axes.get_ylim()[1], limit))


def _once(sign: int, label: str) -> str | None:
    return label if sign > 0 else None


def _steps(losses: np.ndarray) -> np.ndarray:
    return np.arange(1, len(losses) + 1)
