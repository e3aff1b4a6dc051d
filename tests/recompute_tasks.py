"""What ranks do in the tests of recompute and of the options of data parallelism."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from rank_tasks import whole
from tiny_models import labels_of, positions_of, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from octofold.backends.collectives import all_reduce_sum
from octofold.parallel import sequence
from octofold.parallel.balance import gather_loads
from octofold.parallel.config import ParallelConfig, resolve
from octofold.parallel.transport import COUNTED
from octofold.train.build import build_engine, build_model, draft_model
from octofold.train.config import OptimConfig, PrecisionConfig, RunConfig, TrainConfig
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.memory import MemoryNeed
from octofold.train.models.config import ModelConfig
from octofold.train.models.gate import take_loss_sums
from octofold.train.precision.apply import fp8_states, take_traffic

SEQUENCES, LENGTH = 8, 16


class Counting:
    """An observer that counts the numbers it is shown, by kind."""

    wants_products = False

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def tensor(self, kind: str, x: torch.Tensor, quantized: Any) -> None:
        self.seen[kind] = self.seen.get(kind, 0) + x.numel()


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still held by somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return result

    def total(self) -> int:
        return sum(nbytes for held, nbytes in self.storages.values() if held() is not None)


class Collectives(TorchDispatchMode):
    """How often each collective was issued, by the name of its op."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            self.times[name] = self.times.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def configured(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, micro: int) -> RunConfig:
    """A run of this model on this layout; `micro`: sequences of a micro-batch."""
    return RunConfig(
        model=model,
        parallel=resolve(parallel, dist.get_world_size()),
        precision=precision,
        train=TrainConfig(global_batch_size=SEQUENCES, micro_batch_size=micro),
    )


def need(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, micro: int) -> MemoryNeed:
    """What this rank must hold."""
    return draft_model(configured(model, parallel, precision, micro), torch.device("cpu"), 0).need


def step(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, micro: int, *, updates: int = 1
) -> dict[str, Any]:
    """What the first of `updates` steps over 8 sequences does and leaves behind, and the weights after all of them.

    Returns:
        loss, gradients, loads and balance losses of the global batch; `live`: bytes that the first forward pass leaves;
        `seen`: what an observer of FP8 was shown; `traffic` as routes count it; `collectives` by name.
    """
    config = configured(model, parallel, precision, micro)
    built = build_model(config, torch.device("cpu"), model.vocab_size)
    engine = build_engine(built.model, OptimConfig(clip_norm=0), 10, parallel=config.parallel)
    states, gates, observer = fp8_states(built.model), list(built.model.gates().values()), Counting()
    for state in states.values():
        state.observer = observer
    found: dict[str, Any] = {}
    for number in range(updates):
        with Collectives() as communication:
            loss, live = _accumulate(built, engine, number, micro)
        if number == 0:
            named = [(name, p.grad) for name, p in built.model.named_parameters() if p.grad is not None]
            found = {
                "loss": float(all_reduce_sum(loss * built.meshes.speaks)),
                "gradients": whole(named),
                "loads": gather_loads([gate.load_E for gate in gates]),
                "balance": take_loss_sums(gates),
                "live": live,
                "seen": observer.seen,
                "amax": {name: state.amax_K.clone() for name, state in states.items() if state.recipe.delayed},
                "traffic": dict(zip(COUNTED, take_traffic(built.model).tolist(), strict=True)),
                "collectives": communication.times,
            }
        engine.step()
    return {**found, "weights": whole(engine.tensors().items())}


def _accumulate(built: Any, engine: Any, number: int, micro: int) -> tuple[torch.Tensor, int]:
    """This rank's part of the global mean loss, and the bytes held after the first forward pass."""
    meshes = built.meshes
    tokens_BS = tokens_of(built.model.config, SEQUENCES, LENGTH, number)
    labels_BS, total, live = labels_of(tokens_BS), torch.zeros((), dtype=torch.float64), 0
    share = SEQUENCES // (meshes.size("data_replicate") * meshes.size("data_shard"))
    mine = slice(meshes.data_rank * share, (meshes.data_rank + 1) * share)

    def own(x_BS: torch.Tensor) -> torch.Tensor:
        return sequence.positions_of(x_BS, meshes.rank("context"), meshes.size("context"))

    for gate in built.model.gates().values():
        gate.loss_scale.fill_(1 / SEQUENCES)
    parts = list(zip(tokens_BS[mine].split(micro), labels_BS[mine].split(micro), strict=True))
    for index, (tokens, labels) in enumerate(parts, start=1):
        held = LiveBytes()
        with held:
            ahead = [own(tokens)] * built.model.config.num_nextn_predict_layers
            logits = built.model(own(tokens), own(positions_of(tokens)), ahead=ahead)
            group = meshes.dense["tensor"].get_group()
            loss = torch.stack([summed_cross_entropy(x, own(labels), group) for x in logits]).sum()
            loss = loss / valid_tokens(labels_BS)
        live = live or held.total()
        engine.backward(loss, last=index == len(parts))
        total += loss.detach()
    return total, live
