"""`octofold verify layout`: does the configured layout compute what one rank would?

The job in small (train/layout/twin.py) runs on CPU ranks of this machine and on one, from equal weights on equal
tokens: the losses, every parameter's gradient, the norm, every expert's load and bias, and the weights at the end are
held to one another (train/layout/verdict.py), the worst first, and a difference is explained
(train/layout/diagnosis.py).

    FOLDER/config.yaml   the job in small
    FOLDER/one_rank/  FOLDER/layout/   metrics of the runs; those of further seeds in FOLDER/seed_N/
    FOLDER/result.json
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.launch.job import draft, settle
from octofold.launch.run_folder import make_run_folder, write_config
from octofold.launch.software_npu import enter_if_asked
from octofold.launch.verify import VerifyConfig
from octofold.launch.verify_runs import degrees, emulated, plain, warm_ranks
from octofold.parallel.config import ParallelConfig
from octofold.train.config import PrecisionConfig, RunConfig, validate
from octofold.train.layout.twin import proving, shrunk, smallest_world, twin

if TYPE_CHECKING:
    from octofold.parallel.local_ranks import LocalRanks
    from octofold.train.layout.prove import Fp8Proof, Proof

STEPS = 3
SHOWN = 12
"""Differences on the console; result.json has all."""


def verify_layout(
    settings: VerifyConfig, texts: Sequence[str], config_dirs: Sequence[str], *, task: str | None = None
) -> int:
    """Run, compare and tell; returns the exit status: 0 yes, 1 no.

    Args:
        settings: checked.
        texts: overrides as `octofold train` takes them.
        config_dirs: folders with further options of the groups.
        task: what each rank of the layout does, by dotted name; None: `train.layout.record`.

    Raises:
        UserError: a configuration that cannot be honoured.
    """
    asked = _asked(texts, config_dirs)
    enter_if_asked(asked.backend)
    small = shrunk(asked.parallel, settings.ranks)
    ranks = smallest_world(small)
    if ranks == 1:
        rule = "a layout is compared with one rank, so it has more"
        raise ConfigError("parallel", "every degree is 1", rule, "such as parallel.expert=2 or launch.nproc_per_node=2")
    precision = _precision(settings, asked)
    folder = make_run_folder(asked if asked.run_dir else replace(asked, name="verify-layout"))
    proofs: dict[int, Proof | Fp8Proof] = {}
    with warm_ranks(proving(asked.backend)) as on:
        for number in range(settings.seeds):
            seed = asked.train.seed + number
            scratch = folder / f"seed_{seed}" if number else folder
            of_seed = replace(asked, parallel=small, run_dir=None, train=replace(asked.train, seed=seed))
            of_seed = replace(of_seed, backend=replace(asked.backend, ranks_per_node=_ranks_per_node(asked, ranks)))
            config = validate(twin(of_seed, folder, steps=settings.steps or STEPS, precision=precision), ranks)
            assert isinstance(config, JobConfig)
            if not number:
                write_config(folder, config)
            print(f"octofold: seed {seed}: {degrees(small)} on {ranks} ranks, and one rank", file=sys.stderr)
            proofs[seed] = _proved(config, ranks, scratch, on, task)
    holds = all(proof.holds for proof in proofs.values())
    _write_result(folder / "result.json", settings, asked.parallel, small, ranks, proofs)
    _tell(proofs, settings, asked, config, ranks, folder)
    return 0 if holds else 1


def _ranks_per_node(asked: JobConfig, ranks: int) -> int:
    """Two nodes where the job has several, so that what `auto` chooses for them is what is proved."""
    several = 0 < asked.backend.ranks_per_node < smallest_world(asked.parallel)
    return ranks // 2 if several and ranks % 2 == 0 else 0


def _asked(texts: Sequence[str], config_dirs: Sequence[str]) -> JobConfig:
    """The job, validated for the ranks that it is to have: those asked for, else the fewest with its degrees."""
    job = draft(texts, config_dirs)
    if job.resume is not None:
        rule = "a layout is verified from initial weights"
        raise ConfigError("resume", job.resume, rule, "leave resume out")
    if job.parallel.expert_route == "deepep":
        rule = "DeepEP runs on CUDA, and a layout is verified on CPUs"
        raise ConfigError("parallel.expert_route", "deepep", rule, "parallel.expert_route=two_stage")
    if job.parallel.expert_capacity:
        rule = "what finds no place is dropped rank by rank, so that no layout computes what one rank does"
        raise ConfigError("parallel.expert_capacity", job.parallel.expert_capacity, rule, "parallel.expert_capacity=0")
    ranks = job.launch.nproc_per_node if job.launch.nproc_per_node > 1 else smallest_world(job.parallel)
    return settle(texts, config_dirs, world_size=ranks).config


def _precision(settings: VerifyConfig, asked: JobConfig) -> PrecisionConfig:
    """That of the runs: FP8 is the configured recipe, emulated, in blocks that tiny matrices have many of."""
    if settings.precision != "fp8":
        return PrecisionConfig(settings.precision)
    if not asked.precision.is_fp8:
        shown = f"verify.precision=fp8 precision={asked.precision.name}"
        rule = "the recipe that is verified is the configured one"
        raise ConfigError("verify.precision", shown, rule, "precision=fp8_block, or verify.precision=fp64")
    return emulated(asked.precision)


def _proved(
    config: JobConfig, ranks: int, folder: Path, on: "Callable[[int], LocalRanks]", task: str | None
) -> "Proof | Fp8Proof":
    from octofold.parallel.local_ranks import RankError
    from octofold.train.layout.prove import RECORD, prove, prove_fp8

    try:
        if config.precision.is_fp8:
            return prove_fp8(config, ranks, folder, on)
        return prove(config, ranks, folder, on, task=task or RECORD)
    except RankError as error:
        # Neither yes nor no.
        rule = "every rank runs to the end, else there is nothing to compare"
        raise UserError(
            f"{error}\n  rule:   {rule}\n  remedy: see the traceback above; the run is in {folder}"
        ) from error


def _write_result(
    path: Path,
    settings: VerifyConfig,
    asked: ParallelConfig,
    proved: ParallelConfig,
    ranks: int,
    proofs: "dict[int, Proof | Fp8Proof]",
) -> None:
    result = {
        "answer": "yes" if all(proof.holds for proof in proofs.values()) else "no",
        "settings": asdict(settings),
        "asked": asdict(asked),
        "proved": asdict(proved),
        "ranks": ranks,
        "seeds": {seed: asdict(proof) for seed, proof in proofs.items()},
    }
    path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


def _tell(
    proofs: "dict[int, Proof | Fp8Proof]",
    settings: VerifyConfig,
    asked: JobConfig,
    config: RunConfig,
    ranks: int,
    folder: Path,
) -> None:
    """Print what was found, and the conclusion last, on a line of its own."""
    from rich.console import Console as RichConsole

    from octofold.train.layout.prove import FP8_BAR, FP8_GROUP_BAR, Proof

    console = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
    if config.parallel != asked.parallel:
        was, now = degrees(asked.parallel), degrees(config.parallel)
        console.print(f"asked for: {was}\nproved:    {now} (verify.ranks={settings.ranks})", markup=False)
    said, errors = [], []
    for seed, proof in proofs.items():
        errors.append(proof.differences[0].error if isinstance(proof, Proof) else proof.layout / proof.one_rank)
        if isinstance(proof, Proof):
            console.print(_table(proof, f"Seed {seed}: the layout against one rank, worst first"))
            said += [text for text in proof.diagnosis if text not in said]
        else:
            kind = proof.worst_kind
            shown = f"{proof.layout:.4%} on {ranks} ranks, {proof.one_rank:.4%} on one"
            layout, one_rank = proof.kinds[kind]
            worst = f"{layout:.4%} and {one_rank:.4%} of {kind}, allowed {FP8_GROUP_BAR} times"
            console.print(f"Seed {seed}: gradients' error against FP64: {shown}; at worst {worst}", markup=False)
    for text in said:
        console.print(f"  {text}", markup=False, soft_wrap=True)
    console.print(f"{folder}/result.json", markup=False, soft_wrap=True)
    answer = "yes" if all(proof.holds for proof in proofs.values()) else "no"
    if isinstance(proof, Proof):
        reason = f"worst relative error {max(errors):.1e}, allowed {proof.tolerance:.0e} in {config.precision.name}"
        if any(isinstance(proof, Proof) and proof.apart for proof in proofs.values()):
            reason += "; ranks issue different collectives"
    else:
        reason = f"FP8 errs {max(errors):.3f} times as much as on one rank, allowed {FP8_BAR}"
    asks = f"does {degrees(config.parallel)} on {ranks} ranks compute what one rank does?"
    console.print(f"{asks} {answer}: {reason}", markup=False, soft_wrap=True, style="bold")


def _table(proof: "Proof", title: str) -> Any:
    """The worst number of each kind, then, where something is wrong, the worst of all."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for heading in ("error", "x one rank's", "on rank", "of", "step", ""):
        table.add_column(
            heading, justify="right" if heading in ("error", "x one rank's", "on rank", "step") else "left"
        )
    kinds: dict[str, int] = {}
    shown = []
    for difference in proof.differences:
        is_first = difference.key.kind not in kinds
        kinds[difference.key.kind] = kinds.get(difference.key.kind, 0) + 1
        if is_first or (difference.error > proof.tolerance and kinds[difference.key.kind] <= SHOWN):
            shown.append(difference)
    for difference in shown:
        key, rank = difference.key, "-" if difference.rank < 0 else str(difference.rank)
        what, times = f"{key.kind} {key.name}".strip(), f"{difference.ratio:.6g}"
        note = difference.note or f"worst of {kinds[key.kind]}"
        table.add_row(f"{difference.error:.1e}", times, rank, what, str(key.step), note)
    return table
