"""A run on this rank as `octofold train` makes it, saving and all, with its course written down. Collective.

What is compared between runs is written down where a step passes by: at the loader, and at the report.
"""

import hashlib
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from octofold.backends.determinism import set_deterministic
from octofold.backends.process_group import RankInfo
from octofold.backends.registry import resolve
from octofold.train.checkpoint.validity import checkpoints_of, valid_checkpoints
from octofold.train.config import RunConfig
from octofold.train.console import Console
from octofold.train.data.batch import Batch
from octofold.train.engines.native import StepResult
from octofold.train.layout.record import spoken_for
from octofold.train.main import build_trainer
from octofold.train.resume.facts import Course, Standing
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer

PUBLISHING_S = 60.0
"""How long a rank that is to die waits for the checkpoint that the run is to be continued from."""


def record(config: RunConfig, run_dir: Path, stand_at: int, kill_at: int | None = None) -> Course:
    """Train to the end on the default process group, from where `config.resume` says; what this rank saw.

    Collective.

    Args:
        config: validated, for as many ranks as the default group has, with train.log_every=1.
        run_dir: where it saves, as `octofold train` does.
        stand_at: the steps after which the run's standing is written down, besides at the end.
        kill_at: the step in which the last rank kills itself (SIGKILL), its gradients ready and its weights not yet
            updated, once the checkpoint of `stand_at` is published. Nobody returns then.
    """
    assert config.train.log_every == 1, config.train.log_every
    backend = resolve(config.backend.name)
    set_deterministic(config.train.deterministic, backend, compiling=config.parallel.compile)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    info = RankInfo(rank, ranks, rank, ranks)
    trainer = build_trainer(config, run_dir, backend, info, Console(enabled=False))
    if kill_at is not None and rank == ranks - 1:
        _arrange_death(trainer, run_dir, stand_at, kill_at)
    # What torch says of its own future, and of how it gathers for us, says nothing of the run.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            witness = _Witness(trainer, stand_at)
            trainer.run(StopSignals())
            return witness.course()
    finally:
        trainer.loader.close()
        if trainer.metrics is not None:
            trainer.metrics.close()


def standing(trainer: Trainer) -> Standing:
    """All that a checkpoint would hold now. Collective."""
    with trainer.logical_order():
        tensors = spoken_for(trainer.engine.tensors().items())
    return Standing(tensors, trainer.state())


class _Witness:
    """Writes down what passes by."""

    def __init__(self, trainer: Trainer, stand_at: int) -> None:
        self._trainer, self._stand_at = trainer, stand_at
        self._next_step: Callable[[], list[Batch]] = trainer.loader.next_step
        self._log = trainer.log
        self._course = Course(trainer.rank, trainer.meshes.data_rank, {}, {}, {})
        trainer.loader.next_step = self._read  # type: ignore[method-assign]
        trainer.log = self._report  # type: ignore[method-assign]

    def course(self) -> Course:
        """What was seen, with the standing at the end."""
        self._course.standings[self._trainer.progress.step] = standing(self._trainer)
        return replace(self._course)

    def _read(self) -> list[Batch]:
        step = self._trainer.progress.step
        if step == self._stand_at:
            self._course.standings[step] = standing(self._trainer)
        batches = self._next_step()
        self._course.samples[step + 1] = [digests(batch) for batch in batches]
        return batches

    def _report(self, record: Any) -> None:
        if record["kind"] == "train":
            self._course.reports[record["step"]] = dict(record)
        self._log(record)


def digests(batch: Batch) -> list[int]:
    """A number for each sequence of a batch: of its tokens, its labels and where its documents begin."""
    rows = zip(batch.tokens_BS, batch.labels_BS, batch.doc_ids_BS, strict=True)
    return [_digest(tokens_S, labels_S, documents_S) for tokens_S, labels_S, documents_S in rows]


def _digest(*parts: torch.Tensor) -> int:
    hashed = hashlib.blake2b(digest_size=6)
    for part in parts:
        hashed.update(part.contiguous().numpy().tobytes())
    return int.from_bytes(hashed.digest(), "big")


def _arrange_death(trainer: Trainer, run_dir: Path, stand_at: int, kill_at: int) -> None:
    update = trainer.engine.step

    def die_or_update(allows: Callable[[float], bool] = math.isfinite) -> StepResult:
        if trainer.progress.step + 1 != kill_at:
            return update(allows)
        deadline_s = time.monotonic() + PUBLISHING_S
        while stand_at not in valid_checkpoints(checkpoints_of(run_dir))[0]:
            assert time.monotonic() < deadline_s, f"no checkpoint of step {stand_at} after {PUBLISHING_S:g} s"
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    trainer.engine.step = die_or_update  # type: ignore[method-assign]
