"""The plots of a report, one function for each, drawn with matplotlib into PNG files.

Every function draws on the axes that it is given, so that the single plots and the overview are the same drawing.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREEN, RED, GREY = "#0072B2", "#009E73", "#D55E00", "#6b6b6b"
BASELINE_COLOURS = {"unigram": "#56B4E9", "bigram": "#CC79A7", "trigram": GREEN}
BALANCE_LOSSES = {"sequence": BLUE, "expert": GREEN, "device": RED, "communication": "#CC79A7", "z": "#E69F00"}
DOTS_PER_INCH = 110
OVERVIEW_COLUMNS = 3
MAX_ANNOTATED_CELLS = 400
MAX_NAMED_LAYERS = 8
FEW_POINTS = 20
"""Below this many points, each is marked and none is smoothed away."""

Records = list[dict[str, Any]]
Plots = Mapping[str, Callable[["Axes", Records], None]]
"""Name -> function that draws it."""


def draw_all(records: Records, plots: Plots, run_name: str, report_dir: Path) -> list[Path]:
    """Draw every plot and the overview; returns the files written, the overview first.

    Args:
        records: a run's records, with at least one of kind `train`.
        plots: such as `PLOTS`.
        run_name: heads the overview.
        report_dir: an existing folder.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    paths = []
    lines = -(-len(plots) // OVERVIEW_COLUMNS)
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15)
    overview = Figure(figsize=(22, 13 / 3 * lines), dpi=DOTS_PER_INCH, layout=layout)
    overview.suptitle(run_name, fontsize=16, fontweight="bold", x=0.01, ha="left", parse_math=False)
    grid = overview.add_gridspec(lines, OVERVIEW_COLUMNS)
    for place, (name, draw) in enumerate(plots.items()):
        draw(overview.add_subplot(grid[divmod(place, OVERVIEW_COLUMNS)]), records)
        figure = Figure(figsize=(8, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
        draw(figure.subplots(), records)
        paths.append(report_dir / f"{name}.png")
        figure.savefig(paths[-1])
    overview_path = report_dir / "overview.png"
    overview.savefig(overview_path)
    return [overview_path, *paths]


def draw_loss(axes: "Axes", records: Records) -> None:
    """Training and validation loss, those of multi-token prediction, the n-gram baselines where the run has ended.

    The axis is in nats a byte once a validation says how many bytes a token has; before that, in nats a token.
    """
    train, validations = of_kind(records, "train"), of_kind(records, "validation")
    bytes_per_token = _bytes_per_token(records)
    steps, losses = column(train, "step"), column(train, "loss")
    if bytes_per_token is None:
        unit, label = "nats/token", "training"
    else:
        unit, losses = "nats/byte", losses / bytes_per_token
        is_byte_level = math.isclose(bytes_per_token, 1, rel_tol=1e-6)
        label = "training" if is_byte_level else f"training (÷ {bytes_per_token:.2f} bytes/token)"
    style(axes, "Loss", f"loss ({unit})")
    _draw_series(axes, steps, losses, label)
    for depth in range(len(train[-1].get("mtp_losses", []))):
        further = column([dict(enumerate(record.get("mtp_losses", []))) for record in train], depth)
        further = smooth(further / (bytes_per_token or 1))
        axes.plot(steps, further, color=BLUE, linestyle=":", linewidth=1.6, label=f"MTP depth {depth + 1}")
    if bytes_per_token is not None:
        final = last_of_kind(records, "final") or {}
        points = {record["step"]: record["loss_per_byte"] for record in validations}
        if final:
            points[final["step"]] = final["validation_loss_per_byte"]
        steps, losses = np.array(sorted(points.items()), dtype=float).T
        axes.plot(steps, losses, "o-", color=RED, markersize=5, linewidth=1, label="validation", zorder=4)
        for name, loss in final.get("baselines", {}).items():
            if loss is not None and math.isfinite(loss):
                colour = BASELINE_COLOURS.get(name, GREY)
                axes.axhline(loss, color=colour, linestyle="--", linewidth=1.3, label=f"{name} bytes: {loss:.2f}")
    axes.legend(frameon=False)


def draw_learning_rate(axes: "Axes", records: Records) -> None:
    """The learning rate of each step."""
    train = of_kind(records, "train")
    style(axes, "Learning rate", "learning rate")
    axes.yaxis.set_major_formatter("{x:g}")
    steps = column(train, "step")
    axes.plot(steps, column(train, "lr"), color=BLUE, linewidth=1.8, marker=marker(steps))
    axes.set_ylim(bottom=0)


def draw_gradient_norm(axes: "Axes", records: Records) -> None:
    """The global gradient norm before clipping, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    train = of_kind(records, "train")
    style(axes, "Gradient norm", "global L2 norm before clipping")
    norms = column(train, "grad_norm")
    if (norms > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _draw_series(axes, column(train, "step"), norms, "gradient norm")
    axes.legend(frameon=False)


def draw_throughput(axes: "Axes", records: Records) -> None:
    """Tokens a second, with the median."""
    train = of_kind(records, "train")
    style(axes, "Throughput", "tokens/s")
    rates = column(train, "tokens_per_s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _draw_series(axes, column(train, "step"), rates, "tokens/s")
    if (finite := rates[np.isfinite(rates)]).size:
        median = float(np.median(finite))
        axes.axhline(median, color=GREY, linestyle="--", linewidth=1.3, label=f"median {median:,.0f}")
        axes.set_ylim(0, 1.15 * float(finite.max()))
    axes.legend(frameon=False)


def draw_expert_load(axes: "Axes", records: Records) -> None:
    """Heat map, layers by experts: load of the last training record, as a multiple of an even share."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    train = of_kind(records, "train")
    loads = expert_loads(train[-1])
    axes.set_title(f"Expert load at step {train[-1]['step']}", loc="left", fontweight="bold")
    if not loads:
        _say(axes, "no expert layers")
        return
    grid_LE = np.full((len(loads), max(len(load) for load in loads.values())), np.nan)
    for row, load in enumerate(loads.values()):
        grid_LE[row, : len(load)] = load
    top = max(2.0, float(np.nanmax(grid_LE, initial=0.0)))
    image = axes.imshow(grid_LE, cmap="PuOr_r", norm=TwoSlopeNorm(1, 0, top), aspect="auto", interpolation="nearest")
    if len(loads) <= 32:
        axes.set_yticks(range(len(loads)), list(loads))
    axes.xaxis.set_major_locator(MaxNLocator(32, integer=True, min_n_ticks=1))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("load ÷ even share (1 = balanced)")
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if grid_LE.size <= MAX_ANNOTATED_CELLS:
        for (layer, expert), load in np.ndenumerate(grid_LE):
            shade = "white" if load < 0.45 or load > 1 + 0.65 * (top - 1) else "black"
            axes.text(expert, layer, f"{load:.1f}", ha="center", va="center", fontsize=7, color=shade)


def draw_imbalance(axes: "Axes", records: Records) -> None:
    """Busiest expert's load as a multiple of the mean, by layer, over the steps."""
    style(axes, "Expert imbalance", "busiest expert ÷ mean load")
    _draw_layers(axes, records, "imbalance", even=1)


def draw_entropy(axes: "Axes", records: Records) -> None:
    """Entropy of the expert loads as a share of its largest value, by layer, over the steps."""
    style(axes, "Entropy of expert load", "entropy ÷ ln(experts)")
    _draw_layers(axes, records, "load_entropy", even=1)


def draw_unused(axes: "Axes", records: Records) -> None:
    """Share of the experts that no token chose, by layer, over the steps."""
    style(axes, "Unused experts", "share of the layer's experts")
    _draw_layers(axes, records, "unused_share", even=0)


def draw_balance_losses(axes: "Axes", records: Records) -> None:
    """Balance losses without their weights, on a logarithmic axis: those of loads are near 1 when even, z is not."""
    train = of_kind(records, "train")
    style(axes, "Balance losses", "mean over sequences and layers")
    present = [name for name in BALANCE_LOSSES if f"{name}_loss" in train[-1]]
    if not present:
        _say(axes, "no balance losses")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    steps = column(train, "step")
    for name in present:
        values = smooth(column(train, f"{name}_loss"))
        axes.plot(steps, values, color=BALANCE_LOSSES[name], linewidth=1.6, marker=marker(steps), label=name)
    axes.legend(frameon=False)


def _draw_layers(axes: "Axes", records: Records, name: str, even: float) -> None:
    """One field of `balance`, a line a layer, beside its value where all experts are used alike."""
    from matplotlib import colormaps

    train = of_kind(records, "train")
    of_layers = [record.get("balance", {}).get(name, {}) for record in train]
    layers = list(of_layers[-1])
    if not layers:
        _say(axes, "no expert layers")
        return
    steps = column(train, "step")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for index, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        is_named = len(layers) <= MAX_NAMED_LAYERS or index in (0, len(layers) - 1)
        axes.plot(
            steps,
            smooth(column(of_layers, layer)),
            color=colour,
            linewidth=1.6,
            marker=marker(steps),
            label=f"layer {layer}" if is_named else None,
        )
    axes.axhline(even, color=GREY, linestyle="--", linewidth=1.3, label="balanced")
    axes.legend(frameon=False, ncols=2)


PLOTS: Plots = {
    "loss": draw_loss,
    "learning_rate": draw_learning_rate,
    "gradient_norm": draw_gradient_norm,
    "throughput": draw_throughput,
    "expert_load": draw_expert_load,
    "expert_imbalance": draw_imbalance,
    "expert_entropy": draw_entropy,
    "unused_experts": draw_unused,
    "balance_losses": draw_balance_losses,
}
"""Those of every run."""


def of_kind(records: Records, kind: str) -> Records:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def last_of_kind(records: Records, kind: str) -> dict[str, Any] | None:
    """The newest record of one kind."""
    return next((record for record in reversed(records) if record["kind"] == kind), None)


def column(records: Sequence[Mapping[Any, Any]], key: str | int) -> np.ndarray:
    """One field of many records as float64; NaN where it is missing or null."""
    values = [record.get(key) for record in records]
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def expert_loads(record: dict[str, Any]) -> dict[str, list[float]]:
    """Each layer's expert loads as multiples of an even share (1 = balanced)."""
    return {layer: [share * len(shares) for share in shares] for layer, shares in record.get("expert_load", {}).items()}


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the points: no lag, where a running average trails a fall.

    The window shrinks towards both ends; values that are not finite count for nothing and leave gaps.
    """
    finite = np.isfinite(values)
    half, last = len(values) // 40, len(values) - 1
    out = np.full(len(values), np.nan)
    for index in np.flatnonzero(finite).tolist():
        reach = min(half, index, last - index)
        window = slice(index - reach, index + reach + 1)
        out[index] = values[window][finite[window]].mean()
    return out


def _bytes_per_token(records: Records) -> float | None:
    """How many bytes a token has, from the newest loss that is given in both units."""
    for record in reversed(records):
        prefix = "validation_" if record["kind"] == "final" else ""
        a_token, a_byte = record.get(f"{prefix}loss"), record.get(f"{prefix}loss_per_byte")
        if a_token and a_byte and math.isfinite(a_token) and math.isfinite(a_byte):
            return a_token / a_byte
    return None


def style(axes: "Axes", title: str, y_label: str) -> None:
    """A title, the steps below, a label beside, and few lines."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _draw_series(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """A noisy series: raw in a light tone, smoothed on top; steps whose value is not finite are marked below."""
    finite = np.isfinite(values)
    if len(values) >= FEW_POINTS:
        axes.plot(steps, np.where(finite, values, np.nan), color=BLUE, linewidth=1, alpha=0.3)
    axes.plot(steps, smooth(values), color=BLUE, linewidth=1.8, marker=marker(steps), label=label)
    if not finite.all():
        bad = steps[~finite]
        marks = np.full(len(bad), 0.02)
        axes.plot(bad, marks, "x", color=RED, transform=axes.get_xaxis_transform(), label=f"not finite: {len(bad)}")


def marker(steps: np.ndarray) -> str | None:
    """One point alone makes no line."""
    return "o" if len(steps) < FEW_POINTS else None
