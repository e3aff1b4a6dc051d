"""The proof of a layout: a run on its ranks and the same run on one, held to one another."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path

import numpy as np

from octofold.backends.recording import first_difference
from octofold.parallel.config import ParallelConfig
from octofold.parallel.local_ranks import LocalRanks
from octofold.train.config import RunConfig, validate
from octofold.train.layout.diagnosis import explain, group_of
from octofold.train.layout.facts import Arrays, RankFacts
from octofold.train.layout.verdict import Difference, compare, told
from octofold.train.models.config import BalanceConfig, ModelConfig
from octofold.train.precision.config import PrecisionConfig

RECORD = "octofold.train.layout.record:record"
"""What every rank does; tests plant faults around it."""
IMPORTS = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining", "torch.distributed.tensor.parallel"),
    *("octofold.train.main", "octofold.train.layout.record", "octofold.train.data.documents", "datasets.arrow_writer"),
)
"""What a rank needs for it."""
TIMEOUT_S = 600.0
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3}
"""Relative. FP32 is a smoke test: Adam and the choice of experts amplify rounding."""
FP8_BAR = 1.2
"""An FP8 layout's error against FP64 may be so many times that of the FP8 run on one rank."""
FP8_GROUP_BAR = 1.5
"""The same of a kind of parameters alone: some are few, and a gate's choice amplifies rounding (1.19 has been seen)."""

Ranks = Callable[[int], LocalRanks]


@dataclass(frozen=True)
class Proof:
    """What was found."""

    holds: bool
    tolerance: float
    differences: list[Difference]
    """Of every number and tensor, the worst first."""
    diagnosis: list[str]
    """What is wrong; empty where the proof holds."""
    apart: str | None
    """Where ranks do not issue the same collectives in the same order, which may hang a job on other devices, the first
    difference."""


def one_rank(config: RunConfig, *, whole_batch: bool = True) -> RunConfig:
    """The same run on one rank.

    Args:
        whole_batch: in one micro-batch; else in micro-batches of the same size, where rounding depends on it.
    """
    micro = config.train.global_batch_size if whole_batch else config.train.micro_batch_size
    alone = replace(config, parallel=ParallelConfig(), train=replace(config.train, micro_batch_size=micro))
    alone = replace(alone, backend=replace(config.backend, ranks_per_node=0, all_reduce="flat"))
    return validate(alone, 1)


def facts(config: RunConfig, ranks: int, run_dir: Path, on: Ranks, task: str = RECORD) -> list[RankFacts]:
    """What each of so many ranks saw of the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found: list[RankFacts] = on(ranks).run(task, config, run_dir, timeout_s=TIMEOUT_S)
    return found


def prove(
    config: RunConfig,
    ranks: int,
    folder: Path,
    on: Ranks,
    *,
    expected: RankFacts | None = None,
    task: str = RECORD,
) -> Proof:
    """Run the layout and one rank, and compare; a wrong layout is explained.

    Args:
        config: validated for `ranks`, in fp64 or fp32.
        folder: gets a run folder for each run.
        on: the processes, by their number.
        expected: what one rank saw, where that is known already.
        task: what each rank of the layout does.
    """
    tolerance = TOLERANCE[config.precision.name]
    alone = one_rank(config)
    if expected is None:
        (expected,) = facts(alone, 1, folder / "one_rank", on)
    found = facts(config, ranks, folder / "layout", on, task)
    differences = compare(told(found), told([expected]), tolerance)

    @cache
    def without(loss: str) -> Arrays | None:
        model = _silenced(alone.model, loss)
        if model == alone.model:
            return None
        silent = replace(alone, model=model, train=replace(alone.train, steps=1))
        (seen,) = facts(silent, 1, folder / f"without_{loss.replace(' ', '_')}", on)
        return seen.steps[0].gradients

    diagnosis = explain(found, expected, differences, tolerance, without)
    apart = first_difference([list(of_rank.calls) for of_rank in found])
    if apart is not None:
        diagnosis.append(f"ranks issue different collectives, of all steps {apart}")
    holds = apart is None and all(difference.error <= tolerance for difference in differences)
    return Proof(holds, tolerance, differences, diagnosis, apart)


def _silenced(model: ModelConfig, loss: str) -> ModelConfig:
    if loss == "MTP losses":
        depths = model.num_nextn_predict_layers
        return replace(model, mtp=replace(model.mtp, loss_weight=0.0, late_loss_weight=0.0)) if depths else model
    kept = {name: getattr(model.balance, name) for name in ("bias_update_rate", "bias_update_until")}
    return replace(model, balance=BalanceConfig(**kept))


@dataclass(frozen=True)
class Fp8Proof:
    """Errors of the first step's gradients against FP64, relative, over all parameters at once and kind by kind."""

    layout: float
    one_rank: float
    kinds: dict[str, tuple[float, float]]
    """Of each kind of parameters (`diagnosis.GROUPS`): the layout's, the one rank's."""

    @property
    def holds(self) -> bool:
        """Whether the layout adds no more than the bars allow, over all parameters and to any kind."""
        if self.layout > FP8_BAR * self.one_rank:
            return False
        return all(layout <= FP8_GROUP_BAR * one_rank for layout, one_rank in self.kinds.values())

    @property
    def worst_kind(self) -> str:
        """The kind of parameters to which the layout adds most."""
        return max(self.kinds, key=lambda kind: self.kinds[kind][0] / (self.kinds[kind][1] or 1e-30))


def prove_fp8(config: RunConfig, ranks: int, folder: Path, on: Ranks, *, task: str = RECORD) -> Fp8Proof:
    """Run the FP8 layout, FP8 on one rank and FP64 on one rank.

    Args:
        config: validated for `ranks`, in an FP8 recipe.
    """
    one_step = replace(config, train=replace(config.train, steps=1))
    optim = replace(one_step.optim, moments="fp32")
    exact = one_rank(replace(one_step, optim=optim, precision=PrecisionConfig("fp64")))
    (truth,) = facts(exact, 1, folder / "one_rank_fp64", on)
    (alone,) = facts(one_rank(one_step, whole_batch=False), 1, folder / "one_rank_fp8", on)
    spread = facts(one_step, ranks, folder / "layout", on, task)
    gradients: Arrays = {}
    for of_rank in reversed(spread):
        gradients |= of_rank.steps[0].gradients
    right, single = truth.steps[0].gradients, alone.steps[0].gradients
    kinds = {
        kind: (error_of(_of(kind, gradients), _of(kind, right)), error_of(_of(kind, single), _of(kind, right)))
        for kind in sorted({group_of(name) for name in right})
    }
    return Fp8Proof(error_of(gradients, right), error_of(single, right), kinds)


def _of(kind: str, gradients: Arrays) -> Arrays:
    return {name: gradient for name, gradient in gradients.items() if group_of(name) == kind}


def error_of(found: Arrays, right: Arrays) -> float:
    """Root of the summed squared differences, relative to the right gradients'; infinite where one is missing."""
    if found.keys() != right.keys():
        return float("inf")
    apart = sum(float(np.square(found[name].astype(np.float64) - b).sum()) for name, b in right.items())
    return sqrt(apart / sum(float(np.square(b).sum()) for b in right.values()))
