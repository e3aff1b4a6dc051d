"""How often a layer with experts waits for its device. It runs, forward and backward, on tensors that have no data:
whatever reads one, or needs to know how many elements it will have, fails. The one way of reading that is let through
is `tolist`, which is counted, and answers with sizes made up.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import SMALL

from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import Format
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.parallel.expert import ExchangedExperts, FlatExperts
from octofold.parallel.expert_capacity import CapacityExperts
from octofold.parallel.expert_slices import SlicedExperts
from octofold.parallel.expert_two_stage import TwoStageExperts
from octofold.parallel.transport import Transport
from octofold.train.models.config import BalanceConfig
from octofold.train.models.moe import MixtureOfExperts

TOKENS, SLOTS, RANKS = 8, 2, 4
COPIES = TOKENS * SLOTS
MODEL = replace(
    SMALL,
    hidden_size=64,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=SLOTS,
    n_shared_experts=1,
    balance=BalanceConfig(sequence_loss=0.1, z_loss=0.1, bias_update_rate=0.01),
)


@dataclass(eq=False)
class Group:
    """Stands for a process group."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 1


class Done:
    def wait(self) -> bool:
        return True


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """What `tolist` is called with, as sizes; collectives leave what they fill as it is."""
    asked: list[int] = []

    def tolist(tensor: torch.Tensor) -> list[int]:
        assert tensor.is_meta
        asked.append(len(tensor))
        # Rows for, or from, each rank, several times over; then all rows here, of each rank that holds slices.
        slices = len(tensor) % RANKS
        return [COPIES // RANKS] * (len(tensor) - slices) + [COPIES] * slices

    def exchange(*_: Any, async_op: bool = False, **__: Any) -> Done | None:
        return Done() if async_op else None

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    for name in ("all_to_all_single", "all_gather_single"):
        monkeypatch.setattr(dist, name, exchange)
    return asked


def kernels() -> Kernels:
    """As on CUDA, without the providers that compile."""
    chosen = KernelsConfig(permute="torch", unpermute="torch", quantize="reference", dequantize="reference")
    return choose(chosen, Workload("cuda", torch.bfloat16, (MODEL.hidden_size, MODEL.moe_intermediate_size)))[0]


def pass_through(route: ExchangedExperts) -> None:
    """Forward and backward of a layer whose experts are split over ranks."""
    with torch.device("meta"):
        layer = MixtureOfExperts(MODEL, 1, kernels()).to(torch.bfloat16)
        layer.gate.load_E, layer.gate.loss_scale = layer.gate.load_E.long(), layer.gate.loss_scale.float()
        held = MODEL.n_routed_experts // route.ranks
        for name, weight in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(torch.empty(held, *weight.shape[1:], dtype=weight.dtype)))
        layer.run_experts = route
        x_BSD = torch.empty(2, TOKENS // 2, MODEL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        layer(x_BSD).sum().backward()
    assert x_BSD.grad is not None
    assert all(parameter.grad is not None for parameter in layer.parameters())


FP8 = Transport(Format((1, 32)), Format((1, 32)))
NODES = (0, 0, 1, 1)


@pytest.mark.parametrize("transport", [Transport(), FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("kind", "options", "waits"),
    [
        pytest.param(FlatExperts, {}, 1, id="flat"),
        pytest.param(FlatExperts, {"nodes": NODES}, 1, id="flat over nodes"),
        pytest.param(TwoStageExperts, {"nodes": NODES}, 1, id="two stages"),
        pytest.param(TwoStageExperts, {"nodes": (0, 1, 1, 1)}, 1, id="two stages over unequal nodes"),
        pytest.param(CapacityExperts, {"factor": 1.0}, 0, id="places"),
        pytest.param(CapacityExperts, {"factor": 1.0, "overlap": False}, 0, id="places, nothing beside"),
    ],
)
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "slices"])
def test_waits_of_a_layer(reads, kind, options, waits, sliced, transport):
    slices = SlicedExperts(Group(2)) if sliced else None  # type: ignore[arg-type]
    route = kind(Group(RANKS), slices=slices, **options)
    route.transport = transport
    pass_through(route)
    assert len(reads) == waits


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: bool(x.any()), id="bool"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x[x > 0], id="a mask"),
        pytest.param(lambda x: torch.bincount(x.flatten(), minlength=8), id="bincount"),
        pytest.param(lambda x: x[0].repeat_interleave(x[0]), id="repeats"),
    ],
)
def test_what_waits_would_be_seen(reads, read):
    class Waiting(FlatExperts):
        def _run(self, experts: Any, x_TD: Any, routing: Any, *rest: Any) -> torch.Tensor:
            read(routing.experts_TK)
            return super()._run(experts, x_TD, routing, *rest)

    with pytest.raises((RuntimeError, NotImplementedError)):
        pass_through(Waiting(Group(RANKS)))  # type: ignore[arg-type]
