"""Expert load of a small DeepSeek-V3 trained with and without the bias updates that balance it.

    .venv/bin/python benchmarks/balance.py [--steps 1200] [--seeds 0 1] [--out runs/balance]

Trains `model=deepseek_v3_tiny` in BF16 on one CPU rank, on the standard library's source, twice for each seed: with
`model.balance.bias_update_rate` at 0 and at a rate that suits so short a run. All else is the model's own, its
sequence-wise loss included. Prints the busiest expert's load as a multiple of the mean, averaged over the last quarter
of the steps, and the loss on the whole validation split; draws the load over the steps into OUT/load.png. The runs lie
in OUT, for `octofold report`.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octofold.launch.compose import compose
from octofold.train.config import RunConfig, validate
from octofold.train.main import train
from octofold.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENCES, LENGTH = 8, 256
"""Small batches, since a run this short is limited by its updates; large enough that chance leaves the load even."""
RATE = 0.01
"""DeepSeek-V3 moves biases by 0.001 in each of hundreds of thousands of updates. A score lies between 0 and 1, so that
rate takes 1,000 updates to lift any expert above any other: nearly all that this run has. At 0.01 it takes 100."""
BOUND = 1.5
COLOURS = {"balanced": "#0072B2", "unbalanced": "#D55E00"}


@dataclass(frozen=True)
class Measured:
    """One run: `load_NG`, max ÷ mean at N steps in G layers, and its last loss in nats a token."""

    steps_N: np.ndarray
    load_NG: np.ndarray
    loss: float

    @property
    def last_quarter(self) -> np.ndarray:
        """Max ÷ mean of each layer, averaged over the last quarter of the steps."""
        mean_G: np.ndarray = self.load_NG[self.steps_N > 0.75 * self.steps_N[-1]].mean(0)
        return mean_G


def config_of(rate: float, steps: int, seed: int) -> RunConfig:
    """A run with biases that move at `rate`."""
    texts = [
        "model=deepseek_v3_tiny",
        "backend=cpu",
        # A second thread gains little on so small a model, and much is lost where another process wants its core.
        "backend.threads=1",
        f"model.balance.bias_update_rate={rate}",
        f"data.sequence_length={LENGTH}",
        f"train.global_batch_size={SEQUENCES}",
        f"train.micro_batch_size={SEQUENCES}",
        f"train.steps={steps}",
        f"train.seed={seed}",
        "train.log_every=5",
        "train.eval_every=0",
        "train.sample_tokens=0",
        "optim.lr=3e-3",
        f"optim.warmup_steps={steps // 20}",
        f"checkpoint.every_steps={steps}",
    ]
    return validate(compose(texts), 1)


def measure(config: RunConfig, folder: Path) -> Measured:
    """Train into `folder` and read what was recorded."""
    outcome = train(config, folder)
    if outcome.interrupted_by:
        raise SystemExit(128 + outcome.interrupted_by)
    records = read_metrics(folder)
    steps = [record for record in records if record["kind"] == "train"]
    load_NG = np.array([list(record["balance"]["imbalance"].values()) for record in steps])
    return Measured(np.array([record["step"] for record in steps]), load_NG, records[-1]["validation_loss"])


def counting_noise(config: RunConfig) -> float:
    """Max ÷ mean that chance alone leaves, were all T tokens to choose K of E equally likely experts independently."""
    experts, chosen = config.model.n_routed_experts, config.model.num_experts_per_tok
    mean = SEQUENCES * LENGTH * chosen / experts
    return 1 + math.sqrt(2 * math.log(experts) * (1 - chosen / experts) / mean)


def draw(runs: dict[str, list[Measured]], path: Path) -> None:
    """Max ÷ mean over the steps: the mean over layers, and the worst layer; a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    panels: dict[str, Any] = {"mean over layers": np.mean, "worst layer": np.max}
    axes: Axes
    for axes, (title, over_layers) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for name, of_seeds in runs.items():
            for number, run in enumerate(of_seeds):
                label = f"{name}: bias updates {'on' if name == 'balanced' else 'off'}" if number == 0 else None
                axes.plot(run.steps_N, over_layers(run.load_NG, axis=1), color=COLOURS[name], alpha=0.8, label=label)
        axes.axhline(1, color="#6b6b6b", linestyle="--", linewidth=1)
        axes.set_title(f"Expert load, {title}", loc="left", fontweight="bold")
        axes.set_xlabel("training step")
        axes.set_ylabel("busiest expert ÷ mean load")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def report(runs: dict[str, list[Measured]], config: RunConfig) -> None:
    """Print the table and whether balancing did its work at no cost."""
    print(f"{'':12}{'max ÷ mean load':>20}{'worst layer':>20}{'validation loss (nats/token)':>32}")
    for name, of_seeds in runs.items():
        loads_G = [run.last_quarter for run in of_seeds]
        means, worst = (", ".join(f"{of(load_G):.2f}" for load_G in loads_G) for of in (np.mean, np.max))
        losses = ", ".join(f"{run.loss:.4f}" for run in of_seeds)
        print(f"{name:12}{means:>20}{worst:>20}{losses:>32}")
    print(f"counting noise alone: about {counting_noise(config):.2f}")
    unbalanced, balanced = (np.array([run.loss for run in runs[name]]) for name in ("unbalanced", "balanced"))
    highest = max(float(run.last_quarter.mean()) for run in runs["balanced"])
    print(f"load of the balanced runs: {highest:.2f}, {'below' if highest < BOUND else 'NOT below'} {BOUND}")
    gaps = ", ".join(f"{gap:+.4f}" for gap in balanced - unbalanced)
    print(f"loss, balanced - unbalanced: {gaps}")
    if len(balanced) > 1:
        print(f"between seeds: {np.ptp(unbalanced):.4f} unbalanced, {np.ptp(balanced):.4f} balanced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    arguments = parser.parse_args()
    runs: dict[str, list[Measured]] = {"unbalanced": [], "balanced": []}
    for seed in arguments.seeds:
        for name, rate in (("unbalanced", 0.0), ("balanced", RATE)):
            config = config_of(rate, arguments.steps, seed)
            runs[name].append(measure(config, arguments.out / f"{name}-seed{seed}"))
    draw(runs, arguments.out / "load.png")
    report(runs, config)


if __name__ == "__main__":
    main()
