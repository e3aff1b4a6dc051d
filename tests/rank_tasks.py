"""What ranks do in the tests of parallel/, of collectives and of the engine. Every function runs on every rank."""

import os
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import labels_of, positions_of, tokens_of
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from octofold.backends.collectives import all_reduce_sum, exchange_counts
from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import Format
from octofold.kernels.registry import Workload, choose
from octofold.parallel.balance import gather_loads, update_biases
from octofold.parallel.config import ParallelConfig, resolve
from octofold.parallel.mesh import build_meshes
from octofold.parallel.norm import global_norm
from octofold.parallel.pipeline_ends import SharedEnds
from octofold.parallel.transport import Route, Traffic, exchange
from octofold.train.build import BuiltModel, build_engine, build_model, draft_model
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import CheckpointConfig, OptimConfig, PrecisionConfig, RunConfig, TrainConfig
from octofold.train.engines.native import NativeEngine, model_tensors
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.memory import MemoryNeed
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder

UPDATES = 10
"""What schedules span."""


def whoami(*args: Any) -> tuple[Any, ...]:
    """Rank, world size, process and the arguments."""
    return dist.get_rank(), dist.get_world_size(), os.getpid(), args


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if dist.get_rank() == rank:
        raise KeyError("the offender")
    dist.barrier()


def exit_politely() -> None:
    """What a command line's function may do."""
    raise SystemExit("enough")


def die_on(rank: int, signum: int | None) -> None:
    """One rank dies, by a signal or with exit status 3, while the others wait for it."""
    if dist.get_rank() == rank:
        if signum is None:
            os._exit(3)
        os.kill(os.getpid(), signal.Signals(signum))
    dist.barrier()


def hang_on(rank: int) -> None:
    """One rank never returns."""
    if dist.get_rank() == rank:
        time.sleep(600)


def unpicklable() -> Any:
    """A result that cannot travel."""
    return lambda: None


def world() -> dist.ProcessGroup:
    """The default group."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# --- exchanges -------------------------------------------------------------------------------------------------------


def move(
    blocks: list[list[torch.Tensor]],
    cotangents: list[torch.Tensor],
    forward: Format | None = None,
    backward: Format | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """Exchange `blocks[source][target]`: what this rank received, the gradient of what it sent, the bytes it sent."""
    rank = dist.get_rank()
    rows = torch.cat(blocks[rank]).requires_grad_()
    route = Route(world(), [len(b) for b in blocks[rank]], [len(sent[rank]) for sent in blocks])
    formats = tuple(format for format in (forward, backward) if format is not None)
    kernels, _ = choose(KernelsConfig(), Workload("cpu", rows.dtype, formats=formats))
    traffic = Traffic()
    received = exchange(rows, route, kernels, traffic, purpose="dispatch", forward=forward, backward=backward)
    received.backward(cotangents[rank])
    assert rows.grad is not None
    return received.detach(), rows.grad, traffic.take()


def count_exchange(counts_RRL: torch.Tensor) -> torch.Tensor:
    """exchange_counts of this rank's row of counts."""
    return exchange_counts(counts_RRL[dist.get_rank()].contiguous(), world())


# --- whole models ----------------------------------------------------------------------------------------------------


def build(model: ModelConfig, expert: int = 1, precision: str = "fp64", seed: int = 0) -> BuiltModel:
    """The model on `expert` expert ranks, the rest data."""
    config = RunConfig(
        model=model,
        parallel=resolve(ParallelConfig(expert=expert), dist.get_world_size()),
        precision=PrecisionConfig(precision),
        train=TrainConfig(seed=seed),
    )
    return build_model(config, torch.device("cpu"), model.vocab_size)


def need(model: ModelConfig, expert: int = 1) -> MemoryNeed:
    """What this rank must hold to train the model in FP64."""
    config = RunConfig(
        model=model,
        parallel=resolve(ParallelConfig(expert=expert), dist.get_world_size()),
        precision=PrecisionConfig("fp64"),
        train=TrainConfig(global_batch_size=4 * dist.get_world_size()),
    )
    return draft_model(config, torch.device("cpu"), 0).need


def whole(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Unsplit copies by name."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in named}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


def initial_weights(model: ModelConfig, expert: int, precision: str) -> dict[str, torch.Tensor]:
    """Every parameter and bias of a model nothing has happened to, unsplit."""
    return whole(build(model, expert, precision).model.state_dict().items())


def load_weights(model: ModelConfig, expert: int, run_dir: Path) -> dict[str, torch.Tensor]:
    """The run's checkpoint of weights in a model on `expert` expert ranks: every parameter and bias, unsplit."""
    built = build(model, expert).model
    engine = build_engine(built, OptimConfig(), UPDATES)
    checkpointer = Checkpointer(run_dir, CheckpointConfig(), torch.device("cpu"))
    assert checkpointer.load(run_dir, engine.tensors()).state["weights_only"]
    assert not any(t.any() for name, t in engine.tensors().items() if name.startswith("optim."))
    return whole(built.state_dict().items())


def saved_weights(model: ModelConfig, expert: int, run_dir: Path) -> dict[str, torch.Tensor]:
    """Save a model on `expert` expert ranks; its parameters and biases, unsplit."""
    built = build(model, expert).model
    checkpointer = Checkpointer(run_dir, CheckpointConfig(), torch.device("cpu"))
    checkpointer.save(1, model_tensors(built), {})
    checkpointer.wait()
    return whole(model_tensors(built).items())


def backward(engine: NativeEngine, model: Decoder, tokens_BS: torch.Tensor, micro: int, factor: float = 1.0) -> float:
    """Accumulate the gradients of the global mean loss (times `factor`) over this rank's share of the sequences.

    Returns:
        The global loss in nats a valid token.
    """
    labels_BS = labels_of(tokens_BS)
    share = len(tokens_BS) // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    parts = list(zip(tokens_BS[mine].split(micro), labels_BS[mine].split(micro), strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for number, (tokens, labels) in enumerate(parts, start=1):
        logits = model(tokens, positions_of(tokens))
        loss = factor * summed_cross_entropy(logits, labels) / valid_tokens(labels_BS)
        engine.backward(loss, last=number == len(parts))
        total += loss.detach()
    return float(all_reduce_sum(total))


def gradients(model: ModelConfig, expert: int, tokens_BS: torch.Tensor, micro: int) -> dict[str, Any]:
    """Loss, unsplit gradients, their global norm and the expert loads of one global batch."""
    built = build(model, expert).model
    engine = build_engine(built, OptimConfig(), 10)
    loss = backward(engine, built, tokens_BS, micro)
    named = [(name, p.grad) for name, p in built.named_parameters() if p.grad is not None]
    loads_GE = gather_loads([gate.load_E for gate in built.gates().values()])
    return {
        "loss": loss,
        "gradients": whole(named),
        "norm": float(global_norm(gradient for _, gradient in named)),
        "loads": loads_GE,
    }


def norms(model: ModelConfig, expert: int) -> tuple[float, float]:
    """global_norm over the parameters of a split model and a replicated tensor, and the same from unsplit copies."""
    built = build(model, expert)
    mesh = built.meshes.experts
    replicated = distribute_tensor(torch.arange(5.0, dtype=torch.float64), mesh, [Replicate()] * mesh.ndim)
    tensors = [*built.model.parameters(), replicated]
    full = [tensor.full_tensor() for tensor in tensors if isinstance(tensor, DTensor)]
    exact = torch.stack([tensor.double().square().sum() for tensor in full]).sum().sqrt()
    return float(global_norm(tensors)), float(exact)


def dtypes(model: ModelConfig, expert: int, precision: str) -> dict[str, Any]:
    """How parameters are held, computed with and differentiated: dtypes, and the axes they are split over."""
    built = build(model, expert, precision)
    computed: dict[str, torch.dtype] = {}

    def note(module: nn.Module, inputs: Any, name: str) -> None:
        # Modules that are gathered on their own come later and have the last word.
        computed.update({f"{name}.{key}": p.dtype for key, p in module.named_parameters()})

    for name, module in built.model.named_modules():
        module.register_forward_pre_hook(partial(note, name=name))
    tokens_BS = tokens_of(model, 2, 5)
    logits_BSV = built.model(tokens_BS, positions_of(tokens_BS))
    logits_BSV.float().square().sum().backward()
    parameters = dict(built.model.named_parameters())
    return {
        "logits": logits_BSV.dtype,
        "computed": {name.lstrip("."): dtype for name, dtype in computed.items()},
        "held": {name: p.dtype for name, p in parameters.items()},
        "gradients": {name: p.grad.dtype for name, p in parameters.items() if p.grad is not None},
        "axes": {name: p.device_mesh.mesh_dim_names for name, p in parameters.items() if isinstance(p, DTensor)},
        "biases": {gate.e_score_correction_bias.dtype for gate in built.model.gates().values()},
    }


def mesh_ranks(config: ParallelConfig) -> dict[str, Any]:
    """Of each axis of each view, the ranks that this rank shares it with; and what it reads and speaks for."""
    meshes = build_meshes(config, "cpu")
    views = {name: getattr(meshes, name) for name in ("dense", "experts", "split", "whole", "shared")}
    groups = {
        f"{name}.{axis}": dist.get_process_group_ranks(view[axis].get_group())
        for name, view in views.items()
        for axis in view.mesh_dim_names or ()
    }
    return {"groups": groups, "data_rank": meshes.data_rank, "speaks": meshes.speaks}


def wait_in_a_mesh(config: ParallelConfig, seconds: float) -> tuple[str, float]:
    """Sum over the data ranks, to which rank 1 comes too late: what the others are told, and after how many seconds."""
    group = build_meshes(config, "cpu").dense["data_shard"].get_group()
    if dist.get_rank() == 1:
        time.sleep(seconds)
        return "", 0.0
    began_s = time.monotonic()
    try:
        all_reduce_sum(torch.ones(2), group)
    except RuntimeError as error:
        return str(error), time.monotonic() - began_s
    return "", time.monotonic() - began_s


def balance(loads_RGE: torch.Tensor, rate: float) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Global loads, biases after an update from 0.5, and the counters, from this rank's loads."""
    loads = list(loads_RGE[dist.get_rank()].clone())
    biases = [torch.full((loads_RGE.shape[-1],), 0.5) for _ in loads]
    loads_GE = gather_loads(loads)
    update_biases(biases, loads_GE, rate)
    return loads_GE, biases, loads


# --- the engine ------------------------------------------------------------------------------------------------------


def train_steps(
    model: ModelConfig, optim: OptimConfig, expert: int, micro: int, factors: list[dict[int, float]]
) -> dict[str, Any]:
    """One optimiser step for each entry of `factors`: what this rank's loss is multiplied by (rank -> factor)."""
    built = build(model, expert).model
    engine = build_engine(built, optim, 10)
    results, weights, cleared = [], [whole(engine.tensors().items())], []
    for step, factor in enumerate(factors):
        backward(engine, built, tokens_of(model, 4, 9, step), micro, factor.get(dist.get_rank(), 1.0))
        results.append(engine.step())
        weights.append(whole(engine.tensors().items()))
        cleared.append(all(p.grad is None for p in built.parameters()))
    return {"results": results, "weights": weights, "updates": engine.updates, "cleared": all(cleared)}


def sum_shared_gradients(held: tuple[bool, bool]) -> float:
    """The first entry of this rank's gradient after ends of a pipeline were summed; `held`: who has one before."""
    rank, group = dist.get_rank(), world()
    parameter = torch.nn.Parameter(torch.zeros(3))
    if held[rank]:
        parameter.grad = torch.full((3,), rank + 1.0)
    ends = SharedEnds(parameter if rank == 0 else None, parameter if rank == 1 else None, group, last=1)
    ends.sum_gradients()
    assert parameter.grad is not None
    return float(parameter.grad[0])
