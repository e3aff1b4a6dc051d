"""`octofold verify precision`: does the FP8 recipe train like BF16, and are its products right?

For each seed three runs on the same batches from the same initial weights: FP8 as asked for, BF16, and BF16 again with
norms and SwiGLUs by another provider, which differs in rounding only. All else is the same, the optimiser's moments
included. The loss curves answer (train/precision/verdict.py), unless the products of the FP8 run's last checkpoint are
wrong (train/precision/probe.py), which shows long before a loss does; and nothing is a yes whose products nobody saw.

    FOLDER/{fp8,bf16,bf16_again}/   ordinary run folders; those of further seeds in FOLDER/seed_N/
    FOLDER/result.json   FOLDER/curves.png

The same command with run_dir=FOLDER goes on with what was interrupted, and trains only the seeds that are new.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.launch.job import settle
from octofold.launch.run_folder import (
    CONFIG_NAME,
    checkpoints,
    has_checkpoint,
    make_run_folder,
    read_config,
    write_config,
)
from octofold.launch.software_npu import enter_if_asked
from octofold.launch.verify import VerifyConfig
from octofold.launch.verify_runs import plain
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.verdict import Answer, Curves, Verdict, judge, smooth

if TYPE_CHECKING:
    from octofold.train.precision.probe import Accusation, Probe

RUNS = ("fp8", "bf16", "bf16_again")
"""FP8 first: what it cannot do is told before anything else is trained."""
EXIT_STATUS: dict[Answer, int] = {"yes": 0, "no": 1, "inconclusive": 3}
USERS_MISTAKE = 2
"""The exit status of a run that stopped itself, such as one whose loss stays NaN."""
PROBED_STEPS = 3
SHOWN_ACCUSATIONS = 8


@dataclass(frozen=True)
class Products:
    """What the products of the FP8 run were found to be."""

    probes: "dict[str, Probe]"
    accusations: "list[Accusation]"
    unmeasured: str | None = None
    """Why nothing was measured."""


def verify_precision(settings: VerifyConfig, texts: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Train, judge, draw and tell; returns the exit status (`EXIT_STATUS`, or that of an interrupted run).

    Args:
        settings: checked.
        texts: overrides as `octofold train` takes them.
        config_dirs: folders with further options of the groups.

    Raises:
        UserError: a configuration that cannot be verified, or a run that a user's mistake stopped.
    """
    config = _asked(settings, texts, config_dirs)
    # Of the folder itself; a folder of one's own may hold these runs already.
    folder = make_run_folder(config if config.run_dir else replace(config, name="verify-precision"))
    seeds = []
    for number in range(settings.seeds):
        of_seed = replace(config, train=replace(config.train, seed=config.train.seed + number))
        losses = {}
        for name in RUNS:
            run_dir = (folder / f"seed_{of_seed.train.seed}" if number else folder) / name
            print(f"octofold: seed {of_seed.train.seed}, {name}: {config.train.steps} steps", file=sys.stderr)
            status = _train(replace(variant(of_seed, name), run_dir=str(run_dir)), run_dir)
            losses[name] = _losses(run_dir)
            if status and not (name == "fp8" and status == USERS_MISTAKE and _diverged(losses[name])):
                return status
        seeds.append(Curves(**losses))
    verdict = _judged(seeds, settings)
    products = _measured(config, folder / "fp8")
    answer, reason = _answer(verdict, products)
    _write_result(folder / "result.json", settings, answer, verdict, products)
    _draw(folder / "curves.png", seeds, settings, verdict, config)
    _tell(f"{answer}: {reason}", seeds, settings, verdict, products, folder)
    return EXIT_STATUS[answer]


def variant(config: JobConfig, name: str) -> JobConfig:
    """The job of one of `RUNS`."""
    if name == "fp8":
        return config
    config = replace(config, precision=PrecisionConfig(loss_scale=config.precision.loss_scale))
    if name == "bf16":
        return config
    # Cheap and on every device; the same numbers, summed and rounded in another order.
    chosen = {op: getattr(config.kernels, op) for op in ("rms_norm", "swiglu")}
    others = {op: "torch" if provider == "reference" else "reference" for op, provider in chosen.items()}
    return replace(config, kernels=replace(config.kernels, **others))


def _asked(settings: VerifyConfig, texts: Sequence[str], config_dirs: Sequence[str]) -> JobConfig:
    """The FP8 job, with what a verification decides itself."""
    from octofold.launch.compose import parse

    if any(override.key_or_group == "resume" for override in parse(texts)):
        rule = "all runs of a verification begin with the same initial weights"
        raise ConfigError("resume", "given", rule, "leave resume out")
    config = settle(texts, config_dirs).config
    enter_if_asked(config.backend)
    if not config.precision.is_fp8:
        rule = "BF16 is what FP8 is compared with; without FP8 there is nothing to verify"
        raise ConfigError("precision", config.precision.name, rule, "precision=fp8_block")
    steps = settings.steps or config.train.steps
    train = replace(config.train, steps=steps, log_every=1, eval_every=0, sample_tokens=0)
    return replace(config, train=train, checkpoint=replace(config.checkpoint, every_steps=steps, keep=1))


def _train(config: JobConfig, run_dir: Path) -> int:
    """Train as `octofold train` does, or go on where the run stands; returns the exit status.

    Raises:
        ConfigError: the folder holds a run with other values.
    """
    from octofold.launch.local import start_ranks

    if (run_dir / CONFIG_NAME).exists() and replace(read_config(run_dir), resume=None) != config:
        rule = "it holds a run with other values, and a verification goes on only as it began"
        raise ConfigError("run_dir", str(run_dir), rule, "the same values as before, or another run_dir")
    config = replace(config, resume=str(run_dir) if has_checkpoint(run_dir) else None)
    make_run_folder(config, resuming=True)
    write_config(run_dir, config)
    if config.launch.nproc_per_node > 1:
        ended = start_ranks(config.launch, run_dir)
        # A run that stopped in time has ended well, a verification that is not finished has not.
        return ended.status if ended.stopped_by is None else 128 + ended.stopped_by
    from octofold.train.main import train

    try:
        outcome = train(config, run_dir, stop_deadline_s=config.launch.stop_deadline_s)
    except UserError as error:
        print(f"octofold: {error}", file=sys.stderr)
        return 2
    return 0 if outcome.interrupted_by is None else 128 + outcome.interrupted_by


def _losses(run_dir: Path) -> np.ndarray:
    from octofold.train.metrics import read_metrics

    return np.array([record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"])


def _diverged(losses: np.ndarray) -> bool:
    return bool(losses.size) and not np.isfinite(losses).all()


def _judged(seeds: list[Curves], settings: VerifyConfig) -> Verdict:
    try:
        return judge(seeds, bar=settings.bar, smoothing=settings.smoothing)
    except ValueError as error:
        rule = "a run that BF16 cannot do says nothing of FP8"
        raise UserError(f"{error}\n  rule:   {rule}\n  remedy: a lower optim.lr") from error


def _answer(verdict: Verdict, products: Products) -> tuple[Answer, str]:
    """Of the verification as a whole, with the reason."""
    curves = f"curves: {verdict.reason}"
    if products.accusations:
        return "no", f"{len(products.accusations)} number(s) of the products are beyond their thresholds; {curves}"
    if products.unmeasured is None:
        return verdict.answer, verdict.reason
    unmeasured = f"products were not measured: {products.unmeasured}"
    if verdict.answer == "no":
        return "no", f"{verdict.reason}; {unmeasured}"
    return "inconclusive", f"{unmeasured}; {curves}"


def _measured(config: JobConfig, run_dir: Path) -> Products:
    """The products of a few steps from the last checkpoint of the FP8 run, on one device."""
    from octofold.train.precision.probe import accusations

    found = checkpoints(run_dir)
    if not found:
        return Products({}, [], "the FP8 run saved no checkpoint")
    try:
        probes = _probed(config, found[-1])
    except UserError as error:
        return Products({}, [], " ".join(str(error).split()))
    unmeasured = None
    if not any(probe.products for probe in probes.values()):
        unmeasured = f"none is formed in FP8 with precision.arithmetic={config.precision.arithmetic}"
    return Products(probes, accusations(probes), unmeasured)


def _probed(config: JobConfig, checkpoint: Path) -> "dict[str, Probe]":

    from octofold.backends.determinism import set_deterministic
    from octofold.backends.process_group import RankInfo, joined
    from octofold.backends.registry import resolve
    from octofold.parallel.config import ParallelConfig
    from octofold.parallel.config import resolve as resolve_degrees
    from octofold.train.console import Console
    from octofold.train.main import build_trainer
    from octofold.train.precision.apply import fp8_states
    from octofold.train.precision.probe import watch
    from octofold.train.stop import StopSignals

    train = replace(config.train, global_batch_size=config.train.micro_batch_size, wandb=False, tensorboard=False)
    alone = replace(config, train=train, parallel=resolve_degrees(ParallelConfig(), 1), resume=str(checkpoint))
    alone = replace(alone, precision=replace(alone.precision, watch_every=0))
    backend, info = resolve(config.backend.name), RankInfo()
    set_deterministic(train.deterministic, backend)
    with TemporaryDirectory() as scratch, joined(backend, config.backend, info):
        trainer = build_trainer(alone, Path(scratch), backend, info, Console(enabled=False))
        with trainer.console.progress(1 + PROBED_STEPS, 0) as bar:
            # Smaller batches have larger gradients: where scales come from past steps, there has to be such a step.
            trainer.step(StopSignals(), bar)
            probes = watch(fp8_states(trainer.model))
            for _ in range(PROBED_STEPS):
                trainer.step(StopSignals(), bar)
        trainer.loader.close()
        if trainer.metrics is not None:
            trainer.metrics.close()
    return probes


def _write_result(path: Path, settings: VerifyConfig, answer: Answer, verdict: Verdict, products: Products) -> None:
    modules = {
        name: {"products": {kind: asdict(p) for kind, p in probe.products.items()}, "saturated": probe.saturated}
        for name, probe in products.probes.items()
    }
    result = {
        "answer": answer,
        "settings": asdict(settings),
        "curves": asdict(verdict),
        "accusations": [asdict(accusation) for accusation in products.accusations],
        "unmeasured": products.unmeasured,
        "modules": modules,
    }
    path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


def _draw(path: Path, seeds: list[Curves], settings: VerifyConfig, verdict: Verdict, config: JobConfig) -> None:
    from octofold.launch.verify_plots import draw

    title = f"{config.precision.name} against BF16: {config.model.name}, {verdict.steps} steps, {verdict.seeds} seed(s)"
    draw(seeds, verdict, bar=settings.bar, smoothing=settings.smoothing, title=title, path=path)


def _tell(
    conclusion: str,
    seeds: list[Curves],
    settings: VerifyConfig,
    verdict: Verdict,
    products: Products,
    folder: Path,
) -> None:
    """Print what was found, and the conclusion last, on a line of its own."""
    from rich.console import Console as RichConsole

    console = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(_curves_table(seeds, settings, verdict))
    if products.probes:
        console.print(_products_table(products))
    for accusation in products.accusations[:SHOWN_ACCUSATIONS]:
        console.print(f"  {accusation}", markup=False)
    if (more := len(products.accusations) - SHOWN_ACCUSATIONS) > 0:
        console.print(f"  and {more} more, in result.json", markup=False)
    console.print(f"{folder}/curves.png\n{folder}/result.json", markup=False, soft_wrap=True)
    console.print(f"does FP8 train like BF16? {conclusion}", markup=False, soft_wrap=True, style="bold")


def _curves_table(seeds: list[Curves], settings: VerifyConfig, verdict: Verdict) -> Any:
    from rich.table import Table

    table = Table(title="Loss curves", title_justify="left", box=None, show_header=False)
    for name, label in (("bf16", "BF16"), ("bf16_again", "BF16, rounded otherwise"), ("fp8", "FP8")):
        last = [smooth(getattr(of_seed, name), settings.smoothing)[-1] for of_seed in seeds]
        table.add_row(f"last loss, {label}", "  ".join(f"{loss:.4f}" for loss in last))
    table.add_row("bar", f"±{settings.bar:.3%} of the BF16 loss")
    if verdict.error is not None and verdict.floor is not None:
        error, floor = verdict.error, verdict.floor
        table.add_row("relative error, FP8", f"{error.mean:+.3%} ± {error.half_width:.3%}")
        table.add_row("relative error, BF16 again", f"{floor.mean:+.3%} ± {floor.half_width:.3%}")
        table.add_row("noise floor", f"{floor.reach:.3%}")
    return table


def _products_table(products: Products) -> Any:
    """The worst module for each kind of product and of tensor."""
    from rich.table import Table

    from octofold.train.precision.probe import ERROR_MARGIN, MOST_FAULT, MOST_SATURATED

    table = Table(title="Products: the worst of all modules", title_justify="left", box=None)
    for heading in ("", "found", "at most", "module"):
        table.add_column(heading, justify="right" if heading in ("found", "at most") else "left")
    for kind, most_fault in MOST_FAULT.items():
        seen = {name: probe.products[kind] for name, probe in products.probes.items() if kind in probe.products}
        if not seen:
            continue
        name = max(seen, key=lambda name: seen[name].error / seen[name].expected)
        most = ERROR_MARGIN * seen[name].expected
        table.add_row(f"{kind}: error against FP64", f"{seen[name].error:.3%}", f"{most:.3%}", name)
        name = max(seen, key=lambda name: seen[name].fault)
        table.add_row(f"{kind}: fault against the reference", f"{seen[name].fault:.3%}", f"{most_fault:.3%}", name)
    for kind in ("activation", "weight", "gradient"):
        shares = {name: probe.saturated[kind] for name, probe in products.probes.items() if kind in probe.saturated}
        if shares:
            name = max(shares, key=lambda name: shares[name])
            table.add_row(f"{kind}: saturated", f"{shares[name]:.3%}", f"{MOST_SATURATED:.3%}", name)
    return table
