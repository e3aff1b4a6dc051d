"""The proof of a resume: a run that is killed and continued, held to the same run left alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from octofold.parallel.local_ranks import LocalRanks, RankError
from octofold.train.config import RunConfig
from octofold.train.layout.verdict import Difference, Key, Told, compare
from octofold.train.metrics import read_metrics
from octofold.train.resume.diagnosis import explain
from octofold.train.resume.facts import Course
from octofold.train.resume.verdict import compare_bits, told_of_standing, told_of_steps

RECORD = "octofold.train.resume.record:record"
"""What every rank does; tests plant faults around it."""
TIMEOUT_S = 600.0
TOLERANCE = 1e-9
"""Relative, of steps on another layout, in FP64 (train/layout/prove.py)."""

Ranks = Callable[[int], LocalRanks]


@dataclass(frozen=True)
class Job:
    """A run and the ranks it has."""

    config: RunConfig
    """Validated for `ranks`, with train.log_every=1 and a checkpoint of `stand_at` that is kept."""
    ranks: int


@dataclass(frozen=True)
class Proof:
    """What was found."""

    holds: bool
    tolerance: float
    """0: bit for bit."""
    compared: int
    """Numbers and tensors."""
    differences: list[Difference]
    """Those that differ, the worst first; on another layout also by what rounding may do."""
    diagnosis: list[str]
    """What is wrong; empty where the proof holds."""


def courses(job: Job, run_dir: Path, on: Ranks, stand_at: int, task: str = RECORD) -> list[Course]:
    """What each rank saw of a run that nobody kills."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found: list[Course] = on(job.ranks).run(task, job.config, run_dir, stand_at, timeout_s=TIMEOUT_S)
    return found


def kill(job: Job, run_dir: Path, on: Ranks, stand_at: int, kill_at: int) -> None:
    """Run until the last rank has died of SIGKILL in step `kill_at`, the checkpoint of `stand_at` being published.

    Raises:
        RankError: it failed otherwise.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        on(job.ranks).run(RECORD, job.config, run_dir, stand_at, kill_at, timeout_s=TIMEOUT_S)
    except RankError as error:
        if f"rank {job.ranks - 1} of {job.ranks} died of SIGKILL" not in str(error):
            raise


def resumed(job: Job, run_dir: Path) -> Job:
    """The job that continues what lies in `run_dir`."""
    return replace(job, config=replace(job.config, resume=str(run_dir)))


def judge(
    found: Sequence[Course], expected: Sequence[Course], stood_at: int, *, same_layout: bool, exact: bool = False
) -> Proof:
    """Hold a continued run to the undisturbed one.

    Args:
        found: of its last life, which began after `stood_at` steps.
        same_layout: everything is equal to the bit; else only what was loaded, and the steps from there on within
            `TOLERANCE`.
        exact: of another layout only what was loaded is compared: its steps round by design (FP8).
    """
    last = max(step for course in expected for step in course.reports)
    steps = range(stood_at + 1, last + 1)
    loaded, stood = (told_of_standing(who, stood_at, placement=same_layout) for who in (found, expected))
    differences, compared = compare_bits(loaded, stood), len(stood)
    tolerance = 0.0 if same_layout or exact else TOLERANCE
    if not exact or same_layout:
        ours, theirs = (_course(who, steps, last, same_layout=same_layout) for who in (found, expected))
        compared += len(theirs)
        differences += compare_bits(ours, theirs) if same_layout else _compare_rounded(ours, theirs)
    differences.sort(key=lambda d: (-d.error, d.key.step, d.key))
    exactly = {Key(k.kind, k.step, k.name) for k in stood}
    wrong = [d for d in differences if d.error > (0.0 if d.key in exactly else tolerance)]
    return Proof(not wrong, tolerance, compared, differences, explain(wrong, stood_at))


def _course(who: Sequence[Course], steps: range, last: int, *, same_layout: bool) -> Told:
    return told_of_steps(who, steps, same_layout=same_layout) | told_of_standing(who, last, placement=same_layout)


def _compare_rounded(found: Told, expected: Told) -> list[Difference]:
    """Samples and counts are the same; all else is within rounding, of which the worst is told."""
    exact = {key for key in expected if key.kind in ("samples", "state")}
    alone = {key: {min(told): told[min(told)]} for key, told in expected.items() if key not in exact}
    rounded = compare({k: v for k, v in found.items() if k not in exact}, alone, TOLERANCE)
    same = compare_bits(
        {k: v for k, v in found.items() if k in exact}, {k: v for k, v in expected.items() if k in exact}
    )
    return [*rounded, *same]


def prove(
    job: Job,
    folder: Path,
    on: Ranks,
    *,
    stand_at: int,
    kill_at: int,
    other: Job | None = None,
    task: str = RECORD,
) -> Proof:
    """Run undisturbed; run again, killed in step `kill_at`; continue; compare.

    Args:
        folder: gets a run folder for each run.
        on: the processes, by their number.
        other: continues instead of `job`, on another layout.
        task: what each rank of the continued run does.
    """
    expected = courses(job, folder / "undisturbed", on, stand_at)
    kill(job, folder / "resumed", on, stand_at, kill_at)
    goes_on = resumed(other or job, folder / "resumed")
    found = courses(goes_on, folder / "resumed", on, stand_at, task)
    same_layout = other is None
    proof = judge(found, expected, stand_at, same_layout=same_layout, exact=goes_on.config.precision.name != "fp64")
    return _with_account(proof, folder / "resumed", job.config.train.steps)


def _with_account(proof: Proof, run_dir: Path, steps: int) -> Proof:
    """Besides, the metrics of the run are one curve: every step once, in order."""
    found = [record["step"] for record in read_metrics(run_dir) if record["kind"] == "train"]
    if found == list(range(1, steps + 1)):
        return proof
    said = f"metrics.jsonl tells of the steps {found}, not of each of 1 to {steps} once"
    return replace(proof, holds=False, diagnosis=[*proof.diagnosis, said])
