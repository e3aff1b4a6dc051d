"""What the ranks of a test do with a tiny run. Every function is collective, over the default process group."""

import gc
import io
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends import observing
from octofold.backends.config import BackendConfig
from octofold.backends.determinism import set_deterministic
from octofold.backends.errors import UserError
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.recording import Record, recorded
from octofold.backends.registry import resolve
from octofold.train import closing
from octofold.train.checkpoint.writing import HostCopies
from octofold.train.config import RunConfig
from octofold.train.console import Console
from octofold.train.engines.native import StepResult
from octofold.train.main import build_trainer
from octofold.train.metrics import read_metrics
from octofold.train.sampling import generate
from octofold.train.stop import StopSignals
from octofold.train.trainer import Trainer

Arrays = dict[str, np.ndarray]


def alone(task: Callable[..., Any], *args: Any) -> Any:
    """Call `task` here, on a world of one."""
    with joined(resolve("cpu"), BackendConfig(threads=1), RankInfo()):
        return task(*args)


def build(config: RunConfig, run_dir: Path, stream: TextIO | None = None) -> Trainer:
    """The trainer of this rank, on the process group that is there; rank 0 prints to `stream`."""
    backend = resolve(config.backend.name)
    set_deterministic(config.train.deterministic, backend, compiling=config.parallel.compile)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    info = RankInfo(rank, world_size, rank, world_size)
    return build_trainer(config, run_dir, backend, info, Console(rank == 0, stream or io.StringIO()))


def whole(tensors: dict[str, torch.Tensor]) -> Arrays:
    """Unsplit copies by name; BF16, which numpy lacks, as FP32."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in full.items()}
    return {name: tensor.detach().numpy().copy() for name, tensor in wide.items()}


def run(config: RunConfig, run_dir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train to the end, or until the last rank alone is asked to stop during step `stop_at`; see `outcome`."""
    trainer, stop = build(config, run_dir), StopSignals()

    def ask() -> None:
        if trainer.progress.step + 1 == stop_at and dist.get_rank() == dist.get_world_size() - 1:
            stop.received = signal.SIGTERM

    trainer.loader.next_step = after(ask, trainer.loader.next_step)  # type: ignore[method-assign]
    assert trainer.run(stop) == (stop_at is None)
    return outcome(trainer, run_dir)


def run_while_copies_wait(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """`run`, where what a checkpoint copies waits for the next forward pass to begin; `overlapped`: how often."""
    trainer = build(config, run_dir)
    began, finish, update = threading.Event(), HostCopies.finish, trainer.engine.step
    overlapped = []

    def late(copies: HostCopies) -> None:
        overlapped.append(began.wait(0.0 if trainer.progress.step == config.train.steps else 20.0))
        time.sleep(0.05)
        finish(copies)

    def checked(*given: Any) -> StepResult:
        save = trainer.checkpointer._save
        assert save is None or save.copied.is_set(), "an update that changes what is being copied"
        began.clear()
        return update(*given)

    # A buffer of a user's model, which a forward pass changes.
    trainer.model.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def begin(model: nn.Module, _: Any) -> None:
        model.passes += 1
        began.set()

    trainer.model.register_forward_pre_hook(begin)
    trainer.engine.step = checked  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopies, "finish", late)
        assert trainer.run(StopSignals())
    return {**outcome(trainer, run_dir), "overlapped": sum(overlapped)}


def run_with_dropout(config: RunConfig, run_dir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """`run`, with dropout behind the first decoder layer, as a user's own model may have."""
    trainer, stop = build(config, run_dir), StopSignals()

    def drop(module: nn.Module, inputs: Any, x_BSD: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x_BSD, 0.2, training=module.training)

    trainer.model.layers["0"].register_forward_hook(drop)
    torch.rand(torch.seed() % 7)  # what was drawn before does not count

    def ask() -> None:
        if trainer.progress.step + 1 == stop_at:
            stop.received = signal.SIGTERM

    trainer.loader.next_step = after(ask, trainer.loader.next_step)  # type: ignore[method-assign]
    assert trainer.run(stop) == (stop_at is None)
    return outcome(trainer, run_dir)


def after(first: Callable[[], None], then: Callable[[], Any]) -> Callable[[], Any]:
    """Both, one after the other."""

    def both() -> Any:
        first()
        return then()

    return both


def outcome(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Close the run; its `records` of training steps, and on rank 0 every tensor as a checkpoint names it."""
    trainer.loader.close()
    with trainer.logical_order():
        tensors = whole(trainer.engine.tensors())
    if trainer.metrics is not None:
        trainer.metrics.close()
    records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
    return {
        "records": records,
        "tensors": tensors if dist.get_rank() == 0 or trainer.pipeline else {},
        "progress": asdict(trainer.progress),
        "updates": trainer.engine.updates,
    }


def run_with_slow_rank(config: RunConfig, run_dir: Path, slow_rank: int, late_s: float) -> dict[str, Any]:
    """`run` under the watchdog, with a rank that takes so much longer for a step; also what rank 0 `printed`."""
    printed = io.StringIO()
    trainer = build(config, run_dir, printed)
    if dist.get_rank() == slow_rank:
        trainer.model.register_forward_pre_hook(lambda *_: time.sleep(late_s))
    with trainer.watchdog.watching(0):
        assert trainer.run(StopSignals())
    return {**outcome(trainer, run_dir), "printed": printed.getvalue()}


def run_with_nan(config: RunConfig, run_dir: Path, bad_step: int) -> dict[str, Any]:
    """`run`, with NaN logits at `bad_step` on the last rank alone; also what rank 0 `printed`."""
    printed = io.StringIO()
    trainer = build(config, run_dir, printed)

    def spoil(module: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        bad = trainer.progress.step + 1 == bad_step and dist.get_rank() == dist.get_world_size() - 1
        return logits * float("nan") if bad else logits

    trainer.model.lm_head.register_forward_hook(spoil)
    assert trainer.run(StopSignals())
    return {**outcome(trainer, run_dir), "printed": printed.getvalue()}


def run_with_nan_gradient(config: RunConfig, run_dir: Path, bad_step: int, bad_rank: int) -> dict[str, Any]:
    """`run`, with NaN in the gradients of a parameter at `bad_step`, on one rank alone; and what was `applied` here."""
    trainer, applied = build(config, run_dir), list[bool]()
    step = trainer.engine.step

    def spoiled_step(*given: Any) -> StepResult:
        if trainer.progress.step + 1 == bad_step and dist.get_rank() == bad_rank:
            next(p.grad for p in trainer.model.parameters() if p.grad is not None).mul_(float("nan"))
        result = step(*given)
        applied.append(result.applied)
        return result

    trainer.engine.step = spoiled_step  # type: ignore[method-assign]
    assert trainer.run(StopSignals())
    return {**outcome(trainer, run_dir), "applied": applied}


def error_with_broken_model(config: RunConfig, run_dir: Path) -> str:
    """What the user is told by a run whose logits are always NaN."""
    trainer = build(config, run_dir)
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
    with pytest.raises(UserError) as caught:
        trainer.run(StopSignals())
    trainer.loader.close()
    return str(caught.value)


def refusal(config: RunConfig, run_dir: Path) -> str:
    """What the user is told instead of a run."""
    with pytest.raises(UserError) as caught:
        build(config, run_dir)
    return str(caught.value)


def resave(config: RunConfig, run_dir: Path) -> None:
    """Load what `config.resume` names and save it into `run_dir` from this layout."""
    trainer = build(config, run_dir)
    trainer.saved_step = None
    trainer.save()
    trainer.checkpointer.wait()


def resave_error(config: RunConfig, run_dir: Path) -> str:
    """What the user is told when `resave` fails."""
    with pytest.raises(UserError) as caught:
        resave(config, run_dir)
    return str(caught.value)


def load_error(config: RunConfig, run_dir: Path) -> str:
    """What the user is told when `config.resume` cannot be loaded."""
    with pytest.raises(UserError) as caught:
        build(config, run_dir)
    return str(caught.value)


def write(
    config: RunConfig, run_dir: Path, requests: list[dict[str, Any]], favourite: tuple[int, int] | None = None
) -> tuple[list[str], bool]:
    """The text that the model `config.resume` names makes of each request, and whether it is left in training mode.

    Args:
        requests: differences from a greedy continuation of "the " by 12 tokens, as `generate` has them.
        favourite: a rank, and a token that its logits prefer to all others.
    """
    trainer = build(config, run_dir)

    def prefer(module: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        if favourite and favourite[0] == dist.get_rank():
            logits[..., favourite[1]] = 1e3
        return logits

    if favourite:
        trainer.model.lm_head.register_forward_hook(prefer)
    usual: dict[str, Any] = {"prompt": "the ", "tokens": 12, "context": 64, "temperature": 0.0, "top_k": 0, "seed": 0}
    texts = [
        generate(
            trainer.model,
            trainer.data.tokenizer,
            pipeline=trainer.pipeline,
            device=trainer.device,
            **{**usual, **request},
        )
        for request in requests
    ]
    trainer.loader.close()
    return texts, all(module.training for module in trainer.model.modules())


def soak(config: RunConfig, run_dir: Path, every_steps: int) -> list[dict[str, int]]:
    """Train to the end; what this process holds after every so many steps."""
    trainer = build(config, run_dir)
    process, samples = psutil.Process(), list[dict[str, int]]()
    step = trainer.step

    def measured_step(*args: Any) -> bool:
        going_on = step(*args)
        if trainer.progress.step % every_steps == 0:
            gc.collect()
            samples.append(
                {
                    "step": trainer.progress.step,
                    "resident_bytes": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "process_groups": len(dist.distributed_c10d._world.pg_map),
                }
            )
        return going_on

    trainer.step = measured_step  # type: ignore[method-assign]
    assert trainer.run(StopSignals())
    outcome(trainer, run_dir)
    return samples


def initial_tensors(config: RunConfig, run_dir: Path) -> Arrays:
    """Every tensor before the first step."""
    return whole(build(config, run_dir).engine.tensors())


def validate(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """The validation record of the initial model, its mode afterwards, and load counters that stood at 5 before."""
    trainer = build(config, run_dir)
    gates = trainer.gates.values()
    for gate in gates:
        gate.load_E.fill_(5)
    record = closing.validate(trainer, trainer.config.train.eval_sequences)
    loads = {int(load) for gate in gates for load in gate.load_E}
    return {"record": record, "training": all(m.training for m in trainer.model.modules()), "loads": loads}


def run_with_gradients(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """`run`, with the gradients of the first step, before clipping, as `gradients` (rank 0)."""
    trainer = build(config, run_dir)
    gradients: Arrays = {}
    step, ends = trainer.engine.step, trainer.engine.ends

    def recording_step(*judged: Callable[[float], bool]) -> StepResult:
        if gradients:
            return step(*judged)
        if ends is not None:
            ends.sum_gradients()
        named = trainer.model.named_parameters()
        gradients.update(whole({name: p.grad for name, p in named if p.grad is not None}))
        with pytest.MonkeyPatch.context() as patch:
            if ends is not None:  # their gradients have been summed
                patch.setattr(ends, "sum_gradients", lambda: None)
            return step(*judged)

    trainer.engine.step = recording_step  # type: ignore[method-assign]
    assert trainer.run(StopSignals())
    return {**outcome(trainer, run_dir), "gradients": gradients if dist.get_rank() == 0 or trainer.pipeline else {}}


def record_calls(config: RunConfig, run_dir: Path) -> list[Record]:
    """Every collective of this rank while it trains."""
    trainer, unwaited = build(config, run_dir), len(observing._unwaited)
    with recorded() as records:
        assert trainer.run(StopSignals())
    outcome(trainer, run_dir)
    assert len(observing._unwaited) == unwaited, "every work has been waited for"
    return records


def record_planted_calls(config: RunConfig, run_dir: Path) -> list[Record]:
    """`record_calls`, with a sum in the first gate that the rank with most tokens for expert 0 leaves out."""
    group = dist.new_group(timeout=timedelta(seconds=1), group_desc="planted")
    trainer = build(config, run_dir)
    gate = next(iter(trainer.gates.values()))

    def sum_unless_busiest(*_: object) -> None:
        loads = [torch.zeros_like(gate.load_E[:1]) for _ in range(dist.get_world_size())]
        dist.all_gather(loads, gate.load_E[:1].clone())
        if gate.load_E[0] < max(loads):
            # What waits for a rank that does not come ends with the group's time.
            with suppress(RuntimeError):
                dist.all_reduce(torch.ones(1, dtype=torch.float64), group=group)

    gate.register_forward_hook(sum_unless_busiest)
    with recorded() as records:
        assert trainer.run(StopSignals())
    outcome(trainer, run_dir)
    dist.destroy_process_group(group)
    return records


def run_on_a_full_disk(config: RunConfig, run_dir: Path, in_the_way: Path | None = None) -> tuple[list[str], str]:
    """What a run on a full disk has warned of, and the error that it ends with, "" for none.

    Args:
        in_the_way: a file that is removed when the last save has failed.
    """
    told: list[str] = []
    trainer = build(config, run_dir)
    trainer.checkpointer.warn = told.append

    def warn(text: str) -> None:
        told.append(text)
        if "tried again in" in text and in_the_way is not None:
            in_the_way.unlink(missing_ok=True)

    trainer.console.warn = warn  # type: ignore[method-assign]
    error = ""
    try:
        trainer.run(StopSignals())
    except UserError as failure:
        error = str(failure)
    trainer.loader.close()
    if trainer.metrics is not None:
        trainer.metrics.close()
    return told, error
