"""One rank of a training run, from a configuration to its last checkpoint."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from octofold.backends.base import Backend
from octofold.backends.determinism import set_deterministic
from octofold.backends.flight import FlightRecorder
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.train import history
from octofold.train.build import (
    build_engine,
    build_placement,
    build_utilisation,
    build_watch,
    draft_fitting,
    materialise,
    model_config,
)
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.checkpoint.owning import owned
from octofold.train.checkpoint.storage import Ranks
from octofold.train.closing import finish
from octofold.train.config import RunConfig
from octofold.train.console import Console
from octofold.train.data.build import build_data
from octofold.train.metrics import MetricsWriter, read_metrics
from octofold.train.optim.adamw import require_moments
from octofold.train.precision.policy import require_arithmetic
from octofold.train.startup import startup_sections
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer
from octofold.train.version import code_version
from octofold.train.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    interrupted_by: int | None = None
    """The signal that stopped it before its last step, on some rank."""


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    stop_deadline_s: float = math.inf,
    before: Callable[[Backend, RankInfo], None] | None = None,
) -> Outcome:
    """Train as configured, on the rank that the environment names (RANK, WORLD_SIZE, LOCAL_RANK; else a world of one).

    Collective: every rank of the job calls it with the same arguments. `config` must be validated
    (`train.config.validate`); `config.resume` names what to continue from.

    Args:
        stop_deadline_s: after a signal to stop, a rank that has not saved by then ends its process.
        before: called once ranks can talk, before anything is built; may raise `UserError`, on all of them.

    Raises:
        UserError: data, a checkpoint, the device or the disk cannot serve; nothing already saved is lost.
    """
    info = RankInfo.from_environment()
    console = Console(enabled=info.rank == 0)
    backend = resolve(config.backend.name)
    set_deterministic(config.train.deterministic, backend, compiling=config.parallel.compile)
    with joined(backend, config.backend, info), ExitStack() as held:
        # First, before ranks talk: every rank knows it of its own device.
        require_arithmetic(config.precision, backend.capabilities(info.local_rank))
        require_moments(config.optim, backend.capabilities(info.local_rank))
        if before is not None:
            before(backend, info)
        # After a restart each rank has looked for itself, while another machine's disk may have shown less.
        config = replace(config, resume=Ranks(None).first(lambda: config.resume))
        held.enter_context(owned(run_dir, config.checkpoint, begins=not config.resume))
        trainer = build_trainer(config, run_dir, backend, info, console)
        try:
            # Only from here on is there anything to save: until now Ctrl-C ends the process at once.
            with StopSignals(stop_deadline_s) as stop, trainer.watchdog.watching(trainer.progress.step):
                return _run(trainer, stop, console, run_dir)
        finally:
            trainer.loader.close()
            trainer.checkpointer.close()
            if trainer.metrics is not None:
                trainer.metrics.close()


def build_trainer(config: RunConfig, run_dir: Path, backend: Backend, info: RankInfo, console: Console) -> Trainer:
    """Everything of a run on this rank, standing where `config.resume` says. Collective over the default process group.

    Raises:
        UserError: see `train`.
    """
    device = backend.device(info.local_rank)
    # A model whose vocabulary is known is refused before data is prepared for it.
    built = draft_fitting(config, backend, info, 0) if config.model.vocab_size else None
    data = build_data(
        config.data,
        seed=config.train.seed,
        run_dir=run_dir,
        validation_sequences=config.train.eval_sequences,
        log=console.info,
    )
    model_config(config.model, data.tokenizer.vocab_size)
    built = built or draft_fitting(config, backend, info, data.tokenizer.vocab_size)
    materialise(built, device, seed=config.train.seed)
    console.startup(config.name, startup_sections(config, built, backend, info, data, run_dir))
    engine = build_engine(
        built.model, config.optim, config.train.steps, config.precision.loss_scale, config.parallel, built=built
    )
    watchdog = Watchdog(
        FlightRecorder(info.rank),
        rank=info.rank,
        ranks=info.world_size,
        timeout_s=config.train.hang_timeout_s,
        logs=run_dir / "logs",
    )
    trainer = Trainer(
        config,
        model=built.model,
        pipeline=built.pipeline,
        names=built.names,
        meshes=built.meshes,
        topology=built.topology,
        engine=engine,
        placement=build_placement(config.parallel, built, engine, built.topology.node),
        data=data,
        loader=data.loader(
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=built.meshes.data_rank,
            data_ranks=config.parallel.data,
        ),
        checkpointer=Checkpointer(
            run_dir,
            config.checkpoint,
            device,
            made_by={"version": code_version(), "world_size": info.world_size, "config": asdict(config)},
            warn=console.warn,
            alive=watchdog.sign,
        ),
        watch=build_watch(config.precision, built, device),
        watchdog=watchdog,
        utilisation=build_utilisation(config, built, backend, info),
        console=console,
        metrics=None,
        rank=info.rank,
        device=device,
    )
    if config.resume:
        with watchdog.watching(0):
            console.info(f"continuing from {trainer.load(config.resume)}")
    if info.rank == 0:
        _enter_start(trainer, run_dir, info.world_size)
        trainer.metrics = MetricsWriter(
            run_dir,
            run_name=run_dir.name,
            config=asdict(config),
            wandb=config.train.wandb,
            tensorboard=config.train.tensorboard,
            resumed_step=trainer.progress.step if config.resume else None,
            warn=console.warn,
        )
    return trainer


def _enter_start(trainer: Trainer, run_dir: Path, ranks: int) -> None:
    """Enter into the run's history where these ranks begin."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if trainer.last_checkpoint is None:
        history.append(run_dir, "begin", ranks=ranks)
        return
    step, checkpoint = trainer.progress.step, str(trainer.last_checkpoint)
    skipped = [str(passed) for passed in trainer.checkpointer.skipped]
    history.append(run_dir, "load", step=step, checkpoint=checkpoint, skipped=skipped, ranks=ranks)


def _is_closed(run_dir: Path, step: int) -> bool:
    """Whether the run has its `final` record of that step, as rank 0 sees it. Collective."""

    def look() -> bool:
        return any(record["kind"] == "final" and record["step"] == step for record in read_metrics(run_dir))

    return Ranks(None).first(look)


def _run(trainer: Trainer, stop: StopSignals, console: Console, run_dir: Path) -> Outcome:
    steps = trainer.config.train.steps
    if trainer.progress.step > steps or (trainer.progress.step == steps and _is_closed(run_dir, steps)):
        console.info(f"nothing to do: the run stands at step {trainer.progress.step}; set train.steps above that")
        return Outcome(trainer.progress.step)
    # A run that ended in its closing evaluation has that left to do.
    if trainer.progress.step < steps and not trainer.run(stop):
        console.info(f"stopped at step {trainer.progress.step}; saved {trainer.last_checkpoint}")
        return Outcome(trainer.progress.step, stop.agreed)
    stop.all_saved()
    with trainer.watchdog.longer("closing evaluation"):
        record = finish(trainer)
    console.final(record, run_dir=run_dir, checkpoint=trainer.last_checkpoint)
    return Outcome(trainer.progress.step)
