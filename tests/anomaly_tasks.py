"""Numbers that go wrong in a tiny run, planted on one rank, and what the run says and does. Collective."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_tasks
import torch
import torch.distributed as dist
from torch import nn

from octofold.backends.errors import UserError
from octofold.kernels.recompute import is_recomputing
from octofold.train.config import RunConfig
from octofold.train.metrics import read_metrics
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong."""

    kind: str
    """output (becomes NaN), gradient (of the output, becomes infinite), weight (a row of this rank's shard of the
    module's becomes NaN), bit (one of that shard's, or of a gate's bias, is flipped), off (the output is, by a
    millionth), large (the output becomes fifty times as large)."""
    module: str
    rank: int
    step: int
    micro: int = 0
    row: int = 0
    """The sequence of the micro-batch; of `weight`, the row of the shard."""
    passes: int = 10**9
    """After so many passes over the batch at that step it works again."""
    first: int = 0
    """It begins with this pass."""


def plant(trainer: Trainer, fault: Fault) -> None:
    """Make the fault happen on its rank."""
    if dist.get_rank() != fault.rank:
        return
    named = dict(trainer.model.named_modules())
    module = named[fault.module]
    if fault.kind in ("weight", "bit"):
        trainer.loader.next_step = run_tasks.after(lambda: _spoil(trainer, module, fault), trainer.loader.next_step)
    else:
        module.register_forward_hook(_hook(trainer, fault))


def _spoil(trainer: Trainer, module: nn.Module, fault: Fault) -> None:
    if trainer.progress.step + 1 != fault.step or getattr(trainer, "spoilt", False):
        return
    setattr(trainer, "spoilt", True)  # noqa: B010 - once, also where the run goes back and comes again
    bias = getattr(module, "e_score_correction_bias", None)
    trainer.checkpointer.let_go()  # what was saved before it broke is sound
    with torch.no_grad():
        shard = module.weight.to_local() if bias is None else bias  # type: ignore[union-attr, operator]
        if fault.kind == "weight":
            shard[fault.row] = math.nan
        else:
            shard.view(torch.int64 if shard.element_size() == 8 else torch.int32).flatten()[2] ^= 1 << 20


def _hook(trainer: Trainer, fault: Fault) -> Callable[..., Any]:
    seen = {False: 0, True: 0}

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if trainer.progress.step + 1 != fault.step or not module.training:
            return output
        micros = len(trainer.loader.samples_AB)
        number = seen[is_recomputing()]
        seen[is_recomputing()] += 1
        if number % micros != fault.micro or not fault.first <= number // micros < fault.passes:
            return output
        if fault.kind == "gradient":
            # As an error of this module's backward pass in one sequence.
            output.register_hook(lambda gradient: _row(gradient, fault.row, math.inf))
            return output
        if fault.kind == "off":
            output.data[fault.row] *= 1.0 + 2.0**-20  # and autograd knows nothing of it
            return output
        return _row(output, fault.row, {"output": math.nan, "large": 50.0}[fault.kind])

    return hook


def _row(x: torch.Tensor, row: int, factor: float) -> torch.Tensor:
    factors = torch.ones(len(x), *[1] * (x.dim() - 1), dtype=x.dtype)
    factors[row] = factor
    return x * factors


def run_with_faults(config: RunConfig, run_dir: Path, faults: list[Fault]) -> dict[str, Any]:
    """Train to the end or to an error; see `run_tasks.outcome`. Also `printed`, `anomalies` and `error`; and `taken`,
    by step the global samples of this rank; `holding`, those of the first fault's step with the token of its row."""
    printed, faulty = io.StringIO(), faults[0] if faults else Fault("none", "", 0, 0)
    trainer = run_tasks.build(config, run_dir, printed)
    for fault in faults:
        plant(trainer, fault)
    next_step, taken, holding = trainer.loader.next_step, dict[int, list[list[int]]](), list[int]()

    def noted() -> Any:
        batches, step = next_step(), trainer.progress.step + 1
        taken[step] = trainer.loader.samples_AB.tolist()
        for samples, batch in zip(taken[step], batches, strict=True) if step == faulty.step else ():
            holding.extend(s for s, row in zip(samples, batch.tokens_BS, strict=True) if (row == faulty.row).any())
        return batches

    trainer.loader.next_step = noted  # type: ignore[method-assign]
    error = None
    try:
        trainer.run(StopSignals())
    except UserError as told:
        error = str(told)
    found = run_tasks.outcome(trainer, run_dir)
    anomalies = [record for record in read_metrics(run_dir) if record["kind"] == "anomaly"]
    more = {"printed": printed.getvalue(), "anomalies": anomalies, "error": error, "taken": taken, "holding": holding}
    return {**found, **more, "left_out": trainer.loader.left_out}
