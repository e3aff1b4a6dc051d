"""`octofold verify resume`: is a run that is killed and continued the same run?

The job in small (train/layout/twin.py) runs on CPU ranks of this machine, and again: its last rank is killed (SIGKILL)
in the middle of a step, the others with it, and the job continues from the newest checkpoint. On its own layout all is
held to the undisturbed run bit for bit, in the job's own precision: losses, norms, samples, and every weight, moment,
expert bias, FP8 history and number of the state. On another layout what was loaded is, and the steps from there on
within 1e-9 in FP64. The worst is named first, and what is lost (train/resume/diagnosis.py).

    FOLDER/config.yaml   the job that was run
    FOLDER/same_layout/{undisturbed,resumed}/   the runs; those of further seeds in FOLDER/seed_N/
    FOLDER/other_layout/…
    FOLDER/result.json
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import apply, parse
from octofold.launch.config import JobConfig
from octofold.launch.job import draft, settle
from octofold.launch.run_folder import make_run_folder, write_config
from octofold.launch.software_npu import enter_if_asked
from octofold.launch.verify import VerifyConfig
from octofold.launch.verify_runs import degrees, emulated, plain, warm_ranks
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig, resolve
from octofold.train.config import PrecisionConfig, validate
from octofold.train.layout.twin import proving, shrunk, smallest_world, twin

if TYPE_CHECKING:
    from octofold.parallel.local_ranks import LocalRanks
    from octofold.train.resume.prove import Job, Proof

STEPS = 6
DEGREES = (*DENSE_DEGREES, "expert", "expert_tensor")
SHOWN = 12
"""Differences on the console; result.json has all."""


@dataclass(frozen=True)
class _Layouts:
    """Degrees of the run, and of what continues it besides."""

    own: ParallelConfig
    other: ParallelConfig | None


@dataclass(frozen=True)
class _Plan:
    """One proof."""

    name: str
    """Of its folder."""
    job: "Job"
    other: "Job | None"


def verify_resume(
    settings: VerifyConfig, texts: Sequence[str], config_dirs: Sequence[str], *, task: str | None = None
) -> int:
    """Run, kill, continue, compare and tell; returns the exit status: 0 yes, 1 no.

    Args:
        settings: checked.
        texts: overrides as `octofold train` takes them.
        config_dirs: folders with further options of the groups.
        task: what each rank of a continued run does, by dotted name; None: `train.resume.record`.

    Raises:
        UserError: a configuration that cannot be honoured, or a run that failed.
    """
    asked = _asked(texts, config_dirs)
    enter_if_asked(asked.backend)
    steps = settings.steps or STEPS
    if steps < 2:
        raise ConfigError("verify.steps", steps, "a step before the kill and one after it", f"verify.steps={STEPS}")
    stand_at = steps // 2
    # Before the next checkpoint, and later than the first step after this one if there is room.
    kill_at = min(stand_at + 2, 2 * stand_at)
    own = shrunk(asked.parallel, settings.ranks) if settings.twin else asked.parallel
    layouts = _Layouts(own, _other(settings, own))
    folder = make_run_folder(asked if asked.run_dir else replace(asked, name="verify-resume"))
    proofs: dict[str, Proof] = {}
    with warm_ranks(proving(asked.backend)) as on:
        for number in range(settings.seeds):
            of_seed = replace(asked, train=replace(asked.train, seed=asked.train.seed + number))
            scratch = folder / f"seed_{of_seed.train.seed}" if number else folder
            for plan in _plans(of_seed, layouts, settings, folder, steps, stand_at):
                if not proofs:
                    assert isinstance(plan.job.config, JobConfig)
                    write_config(folder, plan.job.config)
                name = str((scratch / plan.name).relative_to(folder))
                print(f"octofold: {name}: {_described(plan)}, killed in step {kill_at}", file=sys.stderr)
                proofs[name] = _proved(plan, scratch / plan.name, on, stand_at, kill_at, task)
    _write_result(folder / "result.json", settings, asked.parallel, proofs)
    _tell(proofs, folder, stand_at, kill_at)
    return 0 if all(proof.holds for proof in proofs.values()) else 1


def _asked(texts: Sequence[str], config_dirs: Sequence[str]) -> JobConfig:
    """The job, validated for the ranks that it is to have: those asked for, else the fewest with its degrees."""
    job = draft(texts, config_dirs)
    if job.resume is not None:
        rule = "a verification begins runs of its own, and kills and continues them"
        raise ConfigError("resume", job.resume, rule, "leave resume out")
    if job.parallel.expert_route == "deepep":
        rule = "DeepEP runs on CUDA, and a resume is verified on CPUs"
        raise ConfigError("parallel.expert_route", "deepep", rule, "parallel.expert_route=two_stage")
    ranks = job.launch.nproc_per_node if job.launch.nproc_per_node > 1 else smallest_world(job.parallel)
    return settle(texts, config_dirs, world_size=ranks).config


def _plans(
    asked: JobConfig, layouts: _Layouts, settings: VerifyConfig, folder: Path, steps: int, stand_at: int
) -> list[_Plan]:
    """The proofs of one seed: on the same layout, and on another one if there is one to be."""
    from octofold.train.resume.prove import Job

    own, other = layouts.own, layouts.other
    of_both = replace(asked, parallel=_together(own, other or own), run_dir=None, resume=None)

    def job(layout: ParallelConfig, precision: PrecisionConfig) -> Job:
        config = (_in_small if settings.twin else _as_it_is)(of_both, folder, steps, precision)
        if layout is own:
            layout = replace(config.parallel, **{name: getattr(own, name) for name in DEGREES})
        # In folders of its own: `checkpoint.dir` may hold what the job has saved.
        kept = replace(config.checkpoint, dir=None, every_steps=stand_at, keep=0)
        ranks = smallest_world(layout)
        return Job(validate(replace(config, parallel=layout, checkpoint=kept), ranks), ranks)

    precision = emulated(asked.precision)
    plans = [_Plan("same_layout", job(own, precision), None)]
    if other is not None:
        exact = PrecisionConfig("fp64")
        plans.append(_Plan("other_layout", job(own, exact), job(other, exact)))
        if precision.is_fp8:
            plans.append(_Plan("other_layout_fp8", job(own, precision), job(other, precision)))
    return plans


def _other(settings: VerifyConfig, own: ParallelConfig) -> ParallelConfig | None:
    """The layout to continue on, with `data_shard` inferred; None: only the run's own."""
    if not settings.resume_parallel:
        return None
    texts = [f"parallel.{key}={json.dumps(value)}" for key, value in settings.resume_parallel.items()]
    given = apply(JobConfig(), parse(texts)).parallel
    given = resolve(given, smallest_world(given))
    if all(getattr(given, name) == getattr(own, name) for name in DEGREES):
        shown = f"verify.resume_parallel={settings.resume_parallel}"
        raise ConfigError("verify.resume_parallel", shown, "another layout than the run's own", "such as {tensor:2}")
    return given


def _together(one: ParallelConfig, two: ParallelConfig) -> ParallelConfig:
    """Degrees of which those of both layouts are divisors, so that a small job fits both. No layout by itself."""
    both: dict[str, Any] = {name: lcm(getattr(one, name), getattr(two, name)) for name in DEGREES}
    return replace(one, **both)


def _in_small(config: JobConfig, folder: Path, steps: int, precision: PrecisionConfig) -> JobConfig:
    # A scale that grows within the few steps: one that were begun anew would show.
    scale = precision.loss_scale
    scale = replace(scale, growth_interval=min(scale.growth_interval, 2))
    small = twin(config, folder, steps=steps, precision=replace(precision, loss_scale=scale))
    assert isinstance(small, JobConfig)
    return small


def _as_it_is(config: JobConfig, folder: Path, steps: int, precision: PrecisionConfig) -> JobConfig:
    """The job's own model, data and batch, on CPUs, with what a verification decides itself."""
    train = replace(config.train, steps=steps, log_every=1, eval_every=0, sample_tokens=0)
    train = replace(train, deterministic=True, wandb=False, tensorboard=False)
    # One thread a rank: how a sum is split over threads decides its last bits.
    backend = proving(config.backend)
    moments = "fp32" if precision.name == "fp64" else config.optim.moments
    optim = replace(config.optim, moments=moments)
    return replace(config, train=train, backend=backend, precision=precision, optim=optim)


def _proved(
    plan: _Plan,
    folder: Path,
    on: "Callable[[int], LocalRanks]",
    stand_at: int,
    kill_at: int,
    task: str | None,
) -> "Proof":
    from octofold.parallel.local_ranks import RankError
    from octofold.train.resume.prove import RECORD, prove

    try:
        return prove(plan.job, folder, on, stand_at=stand_at, kill_at=kill_at, other=plan.other, task=task or RECORD)
    except RankError as error:
        # Neither yes nor no.
        rule = "every rank that is not killed on purpose runs to the end, else there is nothing to compare"
        remedy = f"see the traceback above; the runs are in {folder}"
        raise UserError(f"{error}\n  rule:   {rule}\n  remedy: {remedy}") from error


def _described(plan: _Plan) -> str:
    job = plan.job
    shown = f"{degrees(job.config.parallel) or 'one rank'} in {job.config.precision.name}"
    return shown if plan.other is None else f"{shown}, continued on {degrees(plan.other.config.parallel) or 'one rank'}"


def _write_result(path: Path, settings: VerifyConfig, asked: ParallelConfig, proofs: "dict[str, Proof]") -> None:
    result = {
        "answer": "yes" if all(proof.holds for proof in proofs.values()) else "no",
        "settings": asdict(settings),
        "asked": asdict(asked),
        "proofs": {name: asdict(proof) for name, proof in proofs.items()},
    }
    path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


def _tell(proofs: "dict[str, Proof]", folder: Path, stand_at: int, kill_at: int) -> None:
    """Print what was found, and the conclusion last, on a line of its own."""
    from rich.console import Console as RichConsole

    console = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
    for name, proof in proofs.items():
        within = f"within {proof.tolerance:.0e}" if proof.tolerance else "bit for bit"
        how = "equal to" if proof.holds else "held to"
        console.print(
            f"{name}: {proof.compared} numbers and tensors {how} the undisturbed run's {within}", markup=False
        )
        if not proof.holds:
            console.print(_table(proof))
        for text in proof.diagnosis:
            console.print(f"  {text}", markup=False, soft_wrap=True)
    console.print(f"{folder}/result.json", markup=False, soft_wrap=True)
    failed = [name for name, proof in proofs.items() if not proof.holds]
    answer = f"no: {', '.join(failed)}" if failed else f"yes: killed in step {kill_at}, continued from step {stand_at}"
    console.print(f"is a resumed run the same run? {answer}", markup=False, soft_wrap=True, style="bold")


def _table(proof: "Proof") -> Any:
    """The worst numbers."""
    from rich.table import Table

    table = Table(title="Worst first", title_justify="left", box=None)
    for heading in ("error", "on rank", "of", "step", ""):
        table.add_column(heading, justify="right" if heading in ("error", "on rank", "step") else "left")
    for difference in proof.differences[:SHOWN]:
        key = difference.key
        what = f"{key.kind} {key.name}".strip()
        table.add_row(f"{difference.error:.1e}", str(difference.rank), what, str(key.step), difference.note)
    return table
