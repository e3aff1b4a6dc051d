"""A short run on this rank with everything that a layout must not change written down. Collective."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from octofold.backends.determinism import set_deterministic
from octofold.backends.hierarchical import sums_taken
from octofold.backends.process_group import RankInfo
from octofold.backends.recording import Record, recorded
from octofold.backends.registry import resolve
from octofold.parallel.placement_moves import slots_by_parameter
from octofold.train.config import RunConfig
from octofold.train.console import Console, RunProgress
from octofold.train.data.batch import Batch
from octofold.train.engines.native import StepResult
from octofold.train.layout.facts import Arrays, RankFacts, StepFacts
from octofold.train.loss import valid_tokens
from octofold.train.main import build_trainer
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer


def record(config: RunConfig, run_dir: Path) -> RankFacts:
    """Train `config.train.steps` steps on the default process group; what this rank saw.

    Collective. Nothing is saved or evaluated; `run_dir` gets the tokenizer and the metrics.

    Args:
        config: validated, for as many ranks as the default group has, with train.log_every=1.
    """
    assert config.train.log_every == 1, config.train.log_every
    backend = resolve(config.backend.name)
    set_deterministic(config.train.deterministic, backend, compiling=config.parallel.compile)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    info = RankInfo(rank, ranks, rank, ranks)
    trainer = build_trainer(config, run_dir, backend, info, Console(enabled=False))
    # What torch says of its own future, and of how it gathers for us, says nothing of the layout.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            with recorded() as calls, sums_taken(config.backend.all_reduce, trainer.topology):
                witness = _Witness(trainer, calls)
                steps = tuple(witness.step() for _ in range(config.train.steps))
            slots = slots_by_parameter(trainer.model)
            weights = spoken_for(trainer.model.named_parameters(), slots=slots)
            return RankFacts(rank, steps, weights, tuple(calls))
    finally:
        trainer.loader.close()
        if trainer.metrics is not None:
            trainer.metrics.close()


@torch.no_grad()
def spoken_for(
    named: Iterable[tuple[str, torch.Tensor]], factor: float = 1.0, slots: Mapping[str, torch.Tensor] | None = None
) -> Arrays:
    """Unsplit copies, times `factor`, of the tensors that this rank speaks for. Collective over each tensor's mesh.

    Along an axis that splits a tensor all ranks put the same whole together, so the first of them speaks. Along one
    that copies it each rank speaks for its own copy: nothing but the layout's own sums makes copies equal. A copy on
    the same rank, as the embedding has one where both ends of a pipeline are, is told apart if it differs.

    Args:
        slots: of experts that do not stand in logical order (parallel/placement_moves.py).
    """
    spoken: Arrays = {}
    for name, tensor in named:
        whole, speaks = tensor, True
        if isinstance(tensor, DTensor):
            whole, coordinate = tensor.full_tensor(), tensor.device_mesh.get_coordinate()
            assert coordinate is not None, name
            split = [not isinstance(placement, Replicate) for placement in tensor.placements]
            speaks = not any(place for place, is_split in zip(coordinate, split, strict=True) if is_split)
        if speaks:
            whole = whole[slots[name]] if slots and name in slots else whole
            wide = whole.detach() if whole.dtype == torch.float64 else whole.detach().float()
            value = (wide * factor).cpu().numpy()
            is_other = name in spoken and not np.array_equal(spoken[name], value)
            spoken[f"{name} (copy)" if is_other else name] = value
    return spoken


class _Witness(RunProgress):
    """Stands where a step passes by: at the loader, before the engine's step, at the report."""

    def __init__(self, trainer: Trainer, calls: list[Record]) -> None:
        """`calls`: of this rank, as they happen; those that only look on are taken out."""
        self._trainer, self._calls = trainer, calls
        self._next_step, self._engine_step = trainer.loader.next_step, trainer.engine.step
        self._facts: dict[str, Any] = {}
        trainer.loader.next_step = self._read  # type: ignore[method-assign]
        trainer.engine.step = self._update  # type: ignore[method-assign]

    def step(self) -> StepFacts:
        """One step of the run."""
        self._trainer.step(StopSignals(), self)
        gates = self._trainer.gates.items()
        biases = {n: gate.e_score_correction_bias for n, gate in gates if gate.e_score_correction_bias is not None}
        return StepFacts(
            **self._facts, biases={layer: bias.double().cpu().numpy().copy() for layer, bias in biases.items()}
        )

    def update(self, record: Mapping[str, Any]) -> None:
        """The report of a step, which every rank makes."""
        self._facts["report"] = dict(record)

    def _read(self) -> list[Batch]:
        batches = self._next_step()
        self._facts["own_tokens"] = sum(valid_tokens(batch.labels_BS) for batch in batches)
        return batches

    def _update(self, allows: Callable[[float], bool] = math.isfinite) -> StepResult:
        engine, model = self._trainer.engine, self._trainer.model
        ends = engine.ends
        if ends is not None:  # the last of the sums that make a gradient, which the engine would do first
            ends.sum_gradients()
        # Zeros where the backward pass has not been: a rank without a gradient takes part in putting it together.
        named, called = model.named_parameters(), len(self._calls)
        graded = [(name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in named]
        self._facts["gradients"] = spoken_for(graded, 1 / engine.scaler.scale, slots_by_parameter(model))
        del self._calls[called:]
        self._facts["loads"] = {n: gate.load_E.cpu().numpy().copy() for n, gate in self._trainer.gates.items()}
        engine.ends = None
        try:
            return self._engine_step(allows)
        finally:
            engine.ends = ends
