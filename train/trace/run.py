"""One training step of one rank of a large job, without the job: what it holds in memory, and what it sends where.

The real model, layout, engine and optimiser run on fake tensors (shapes, no values) over a fake process group of the
job's size. Tokens are taken to choose experts at random, and all ranks to route alike; nothing else is assumed.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from octofold.backends.accounting import Accounting, Cost
from octofold.backends.observing import observed
from octofold.backends.process_group import RankInfo
from octofold.backends.topology import Topology
from octofold.kernels.registry import Kernels
from octofold.parallel.balance import gather_loads
from octofold.parallel.expert import Beside, ExpertRoute, Experts, Routing
from octofold.train.accumulate import Accumulation
from octofold.train.build import BuiltModel, build_engine, draft_model, micro_batches
from octofold.train.config import RunConfig
from octofold.train.data.batch import Batch
from octofold.train.engines.native import NativeEngine
from octofold.train.memory import ParameterCount
from octofold.train.models.decoder import Decoder
from octofold.train.models.stages import Stages
from octofold.train.trace.carried import carry, propagate, read, value_of, write
from octofold.train.trace.memory import MemoryCount


@dataclass(frozen=True)
class Trace:
    """What one step of one rank takes."""

    rank: int
    count: ParameterCount
    kernels: dict[str, str]
    """Op -> its provider."""
    weights_bytes: int
    """This rank's shards of the master weights."""
    gradients_bytes: int
    moments_bytes: int
    peak_bytes: int
    peak_phase: str
    """setup, forward and backward, or update."""
    costs: dict[str, Cost]
    """By group and collective: calls, and bytes sent by class of link."""
    seconds: float
    """That the trace took."""


def trace(config: RunConfig, *, rank: int, ranks: int, device_type: str) -> Trace:
    """Trace a rank's step. The process must not have a default process group; it has none afterwards.

    Args:
        config: validated for `ranks` ranks, with a vocabulary size, without pipeline.
        device_type: of the fake tensors; its library must be loaded.

    Raises:
        UserError: the layout does not fit the model, or reads what a trace cannot know.
    """
    began_s = time.perf_counter()
    per_node = config.backend.ranks_per_node or ranks
    info = RankInfo(rank, ranks, rank % per_node, per_node)
    topology = Topology.read(config.backend, info)
    memory, accounting = MemoryCount(device_type), Accounting(topology)
    device = torch.device(device_type, 0) if device_type != "cpu" else torch.device("cpu")
    with ExitStack() as context:
        context.enter_context(_fake_group(rank, ranks, device_type))
        built = draft_model(config, device, config.model.vocab_size, topology=topology)
        for manager in (FakeTensorMode(allow_non_fake_inputs=True), _Tracing(memory), memory.following_resizes()):
            context.enter_context(manager)
        built.model.to_empty(device=device)
        _know_routing(built.model)
        engine = build_engine(built.model, config.optim, config.train.steps, None, config.parallel, built=built)
        accumulation = _accumulation(config, built, engine, device)
        size = (config.train.micro_batch_size, config.data.sequence_length)
        batches = [_batch(size) for _ in range(micro_batches(config.train, config.parallel))]
        tokens_J = torch.ones(1 + accumulation.depths, dtype=torch.int64, device=device)
        built.model.train()
        with observed(accounting):
            memory.enter("forward and backward")
            accumulation.run(batches, tokens_J, config.model.mtp.loss_weight)
            gradients = sum(_held_bytes(p.grad) for p in built.model.parameters() if p.grad is not None)
            memory.enter("update")
            engine.step()
            if gates := built.model.gates():
                gather_loads([gate.load_E for gate in gates.values()])
        parameters = list(built.model.parameters())
        moments = sum(_held_bytes(m) for p in parameters for m in engine.optimizer.moments(p).values())
        return Trace(
            rank=rank,
            count=built.count,
            kernels={choice.op: choice.provider for choice in built.choices},
            weights_bytes=sum(map(_held_bytes, parameters)),
            gradients_bytes=gradients,
            moments_bytes=moments,
            peak_bytes=memory.peak_bytes,
            peak_phase=memory.peak_phase,
            costs={name: Cost(cost.calls, dict(cost.sent_bytes)) for name, cost in accounting.take().items()},
            seconds=time.perf_counter() - began_s,
        )


def _know_routing(model: Decoder | Stages) -> None:
    """Tell every route to experts which of them tokens choose."""
    shape = model.config
    for module in model.modules():
        if (route := getattr(module, "run_experts", None)) is not None:
            # Not a parameter, module or buffer, so setattr leaves torch's registries alone.
            setattr(module, "run_experts", _Routed(route, shape.n_group, shape.topk_group))  # noqa: B010


def _accumulation(config: RunConfig, built: BuiltModel, engine: NativeEngine, device: torch.device) -> Accumulation:
    """As the trainer has it."""
    return Accumulation(
        built.model,
        engine,
        built.meshes,
        built.pipeline,
        device,
        mask_documents=config.data.mask_documents,
        depths=config.model.num_nextn_predict_layers,
    )


class _Tracing(TorchDispatchMode):
    """Carries what the host reads, and counts memory. Above `FakeTensorMode`."""

    def __init__(self, memory: MemoryCount) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            # Not seen here is what it calls, on its local parts and, to learn shapes, on fake tensors of the whole.
            results = func(*args, **kwargs)
            self.memory.see(tree_map_only(DTensor, lambda x: x._local_tensor, results))
            return results
        if func is torch.ops.aten._local_scalar_dense.default:
            return read(args[0])
        results = func(*args, **kwargs)
        self.memory.see(results)
        if func.namespace == "c10d":
            _carry_received(func, args)
        else:
            propagate(func, args, kwargs, results)
        return results


def _carry_received(func: Any, args: Any) -> None:
    """Counts that travel: every rank counts what this one does, so that it gets from each what it sends to it."""
    name = func._schema.name.removeprefix("c10d::")
    if name not in ("alltoall_base_", "_allgather_base_"):
        return
    received, sent = args[0], args[1]
    value = value_of(sent)
    if value is not None and name == "_allgather_base_":
        with unset_fake_temporarily():
            value = value.flatten().repeat(received.numel() // sent.numel())
    write(received, value)


class _Routed:
    """A route to experts, told which of them each token chooses: at random, in as many groups as the gate allows."""

    def __init__(self, route: ExpertRoute, groups: int, chosen_groups: int) -> None:
        self.route, self.groups, self.chosen_groups = route, groups, chosen_groups

    def __call__(
        self, experts: Experts, x_TD: torch.Tensor, routing: Routing, kernels: Kernels, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        total = routing.counts_E.shape[0]
        with unset_fake_temporarily():
            # The same for every layer and micro-batch.
            generator = torch.Generator().manual_seed(0)
            tokens, slots = routing.experts_TK.shape
            scores_TG = torch.rand(tokens, self.groups, generator=generator)
            outside_TG = torch.ones_like(scores_TG, dtype=torch.bool)
            outside_TG.scatter_(1, scores_TG.topk(self.chosen_groups).indices, False)
            scores_TGe = torch.rand(tokens, self.groups, total // self.groups, generator=generator)
            scores_TGe.masked_fill_(outside_TG[..., None], -1.0)
            experts_TK = scores_TGe.flatten(1).topk(slots).indices
            counts_E = experts_TK.flatten().bincount(minlength=total)
        carry(routing.experts_TK, experts_TK)
        carry(routing.counts_E, counts_E)
        return self.route(experts, x_TD, routing, kernels, beside)


@contextmanager
def _fake_group(rank: int, ranks: int, device_type: str) -> Iterator[None]:
    """A default process group whose collectives return at once and move nothing."""
    backends = "cpu:fake" if device_type == "cpu" else f"{device_type}:fake,cpu:fake"
    dist.init_process_group(backends, rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _batch(shape: tuple[int, int]) -> Batch:
    return Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(4)))


def _held_bytes(tensor: torch.Tensor | None) -> int:
    """Of the part that this rank has."""
    if tensor is None:
        return 0
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
