"""Faults planted in a resume: each is a task like `octofold.train.resume.record:record` with one thing wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from octofold.parallel.placement_moves import ExpertPlacement
from octofold.train.config import RunConfig
from octofold.train.data.loader import Loader
from octofold.train.engines.native import NativeEngine
from octofold.train.resume.facts import Course
from octofold.train.resume.record import record
from octofold.train.trainer import Trainer


def _after_load(spoil: Callable[[Trainer], None], config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """A run in which something is spoilt as soon as a checkpoint has been loaded."""
    load = Trainer.load

    def faulty(trainer: Trainer, *args: Any) -> None:
        load(trainer, *args)
        spoil(trainer)

    with patch.object(Trainer, "load", faulty):
        return record(config, run_dir, stand_at)


def _zero(*parts: str) -> Callable[[Trainer], None]:
    """Zero every tensor whose name has one of these parts."""

    def spoil(trainer: Trainer) -> None:
        for name, tensor in trainer.engine.tensors().items():
            if any(part in name for part in parts):
                tensor.zero_()

    return spoil


def biases_reset(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """The expert biases begin at zero."""
    return _after_load(_zero("e_score_correction_bias"), config, run_dir, stand_at)


def moments_lost(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """AdamW's moments begin at zero."""
    return _after_load(_zero(".exp_avg"), config, run_dir, stand_at)


def histories_lost(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """Delayed scaling has seen nothing."""
    return _after_load(_zero("amax_history"), config, run_dir, stand_at)


def a_weight_lost(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """One shard of one weight is not loaded."""
    return _after_load(_zero("model.layers.1.self_attn.o_proj"), config, run_dir, stand_at)


def tokens_forgotten(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """The account of tokens begins anew."""

    def spoil(trainer: Trainer) -> None:
        trainer.progress.tokens_seen = 0

    return _after_load(spoil, config, run_dir, stand_at)


def cursor_off_by_one(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """One sample is left out."""
    load = Loader.load_state_dict

    def faulty(loader: Loader, state: dict[str, Any]) -> None:
        load(loader, {**state, "samples_seen": state["samples_seen"] + 1})

    with patch.object(Loader, "load_state_dict", faulty):
        return record(config, run_dir, stand_at)


def other_order(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """The cursor is right, and the permutation is drawn from another seed."""
    load = Loader.load_state_dict

    def faulty(loader: Loader, state: dict[str, Any]) -> None:
        load(loader, state)
        loader._seed += 1

    with patch.object(Loader, "load_state_dict", faulty):
        return record(config, run_dir, stand_at)


def loss_scale_reset(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """The loss scale begins as configured."""
    restore = NativeEngine.restore
    with patch.object(NativeEngine, "restore", lambda engine, updates, scale: restore(engine, updates, None)):
        return record(config, run_dir, stand_at)


def updates_forgotten(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """The schedules begin anew."""
    restore = NativeEngine.restore
    with patch.object(NativeEngine, "restore", lambda engine, updates, scale: restore(engine, 0, scale)):
        return record(config, run_dir, stand_at)


def placement_forgotten(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """Experts stand where their numbers put them, and nothing is known of their loads."""
    with patch.object(ExpertPlacement, "load_state_dict", lambda placement, state: None):
        return record(config, run_dir, stand_at)


def schedule_of_the_clock(config: RunConfig, run_dir: Path, stand_at: int) -> Course:
    """Something that no checkpoint holds decides the course: here the learning rate of a resumed run."""

    def spoil(trainer: Trainer) -> None:
        usual = trainer.engine.learning_rate
        trainer.engine.learning_rate = lambda update: 0.5 * usual(update)

    return _after_load(spoil, config, run_dir, stand_at)
