"""How FP8 does in a run: plots of the health of quantised tensors and of the loss scale, and the worst modules.

A plot is there only where the run recorded what it shows. Drawn as in `report_plots.py`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from octofold.launch.report_plots import BLUE, GREEN, RED, Plots, Records, column, marker, of_kind, style
from octofold.train.metrics import worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TENSOR_COLOURS = {"activation": BLUE, "weight": GREEN, "gradient": RED}
SHARES = {"underflow": "Underflow", "saturation": "Saturation"}
LEAST_SHARE = 1e-5
"""Below this a logarithmic axis of shares goes on linearly to 0."""
SHOWN: dict[str, tuple[str, str]] = {
    "underflow": ("underflow", ".3%"),
    "saturation": ("saturation", ".3%"),
    "snr_db": ("signal-to-noise ratio (dB)", ".1f"),
    "scale_spread": ("log2 of largest ÷ smallest scale", ".1f"),
    "amax": ("largest magnitude", ".3g"),
    "non_finite_tiles": ("tiles that were not finite", ",.0f"),
}
"""Metric -> what the table of worst modules calls it, and how it writes the number."""


def precision_plots(records: Records) -> Plots:
    """The plots that a run has something for."""
    plots: dict[str, Callable[[Axes, Records], None]] = {}
    if _samples(records):
        plots |= {f"precision_{metric}": partial(draw_share, metric=metric) for metric in SHARES}
        plots |= {"precision_snr": draw_snr, "precision_scale_spread": draw_scale_spread}
    if any(record.get("loss_scale", 1.0) != 1 for record in of_kind(records, "train")):
        plots["loss_scale"] = draw_loss_scale
    return plots


def draw_share(axes: "Axes", records: Records, metric: str) -> None:
    """A share of the elements of each kind of tensor, in the median and in the worst module, over the steps."""
    style(axes, f"{SHARES[metric]} of FP8 tensors", "share of elements")
    axes.set_yscale("symlog", linthresh=LEAST_SHARE)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    _draw_kinds(axes, records, metric)
    axes.set_ylim(bottom=0)


def draw_snr(axes: "Axes", records: Records) -> None:
    """Signal-to-noise ratio of quantisation, over the steps."""
    style(axes, "Signal-to-noise ratio of quantisation", "Σ x² ÷ Σ (x − quantised x)² (dB)")
    _draw_kinds(axes, records, "snr_db")


def draw_scale_spread(axes: "Axes", records: Records) -> None:
    """How far the scales of a tensor's tiles lie apart, over the steps."""
    style(axes, "Spread of scales within a tensor", "log2 of largest ÷ smallest scale")
    _draw_kinds(axes, records, "scale_spread")
    axes.set_ylim(bottom=0)


def draw_loss_scale(axes: "Axes", records: Records) -> None:
    """The loss scale of each step, on a logarithmic axis, and how many updates overflowed."""
    train = of_kind(records, "train")
    style(axes, "Loss scale", "factor of the loss")
    axes.set_yscale("log", base=2)
    steps = column(train, "step")
    label = f"{train[-1].get('overflows', 0)} updates skipped"
    scales = column(train, "loss_scale")
    axes.plot(steps, scales, color=BLUE, linewidth=1.8, drawstyle="steps-post", marker=marker(steps), label=label)
    axes.legend(frameon=False)


def worst_modules(records: Records) -> tuple[int, dict[str, str]] | None:
    """The step of the last sample, and for each kind of tensor and metric the worst module; None without a sample."""
    samples = _samples(records)
    if not samples:
        return None
    rows: dict[str, str] = {}
    for kind, of_modules in samples[-1]["precision_health"].items():
        for metric, (name, form) in SHOWN.items() if of_modules else ():
            module, value = worst(metric, of_modules)
            median = np.median(list(_values(of_modules, metric)))
            rows[f"{kind}: {name}"] = f"{value:{form}} in {module} (median {median:{form}})"
    return samples[-1]["step"], rows


def _draw_kinds(axes: "Axes", records: Records, metric: str) -> None:
    """A metric of each kind of tensor: the median module as a line, the worst dashed; gaps where it is not finite."""
    samples = _samples(records)
    for kind, colour in TENSOR_COLOURS.items():
        present = [sample for sample in samples if sample["precision_health"].get(kind)]
        if not present:
            continue
        steps, of_samples = column(present, "step"), [sample["precision_health"][kind] for sample in present]
        medians = np.array([np.median(list(_values(of_modules, metric))) for of_modules in of_samples])
        worsts = np.array([worst(metric, of_modules)[1] for of_modules in of_samples])
        for values, line, label in ((medians, "-", f"{kind}, median"), (worsts, "--", f"{kind}, worst")):
            finite = np.where(np.isfinite(values), values, np.nan)
            axes.plot(steps, finite, line, color=colour, linewidth=1.6, marker=marker(steps), label=label)
    axes.legend(frameon=False, ncols=3)


def _samples(records: Records) -> Records:
    """The training records that hold a sample."""
    return [record for record in of_kind(records, "train") if any(record.get("precision_health", {}).values())]


def _values(of_modules: dict[str, dict[str, Any]], metric: str) -> Iterator[float]:
    return (math.nan if metrics[metric] is None else metrics[metric] for metrics in of_modules.values())
