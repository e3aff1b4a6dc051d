"""What ranks do in the tests of routes to experts. Every function runs on every rank."""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import fake_deep_ep
import torch
import torch.distributed as dist
from tiny_models import kernels_for
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octofold.parallel.expert import ExchangedExperts, ExpertRoute, FlatExperts, LocalExperts, Routing
from octofold.parallel.expert_capacity import CapacityExperts
from octofold.parallel.expert_deepep import DeepEpExperts
from octofold.parallel.expert_slices import SlicedExperts
from octofold.parallel.expert_two_stage import TwoStageExperts
from octofold.parallel.transport import Transport
from octofold.train.models.config import ModelConfig
from octofold.train.models.moe import StackedExperts

ROUTES: dict[str, type[ExchangedExperts]] = {
    "flat": FlatExperts,
    "two_stage": TwoStageExperts,
    "capacity": CapacityExperts,
    "deepep": DeepEpExperts,
}


@cache
def _mesh(experts: int, slices: int) -> DeviceMesh:
    return init_device_mesh("cpu", (experts, slices), mesh_dim_names=("expert", "expert_tensor"))


@dataclass(frozen=True)
class Case:
    """A layer's experts, and what each rank's gate chose."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]
    """Of all experts."""
    x: list[torch.Tensor]
    """[T, D] by rank."""
    experts: list[torch.Tensor]
    """[T, K] by rank."""
    gate: list[torch.Tensor]
    """Their weights, [T, K] by rank."""


def through(
    route: ExpertRoute, case: Case, rank: int, held: slice = slice(None), width: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """Result `y` with the shared part, and gradients of `x`, `gate` and each weight, for the loss Σ sin(y)."""
    experts = StackedExperts(case.model)
    for name, weight in case.weights.items():
        setattr(experts, name, nn.Parameter(weight[held][:, :, width].clone(memory_format=torch.contiguous_format)))
    x_TD, gate_TK = case.x[rank].clone().requires_grad_(), case.gate[rank].clone().requires_grad_()
    counts_E = torch.bincount(case.experts[rank].flatten(), minlength=case.model.n_routed_experts)
    routing = Routing(case.experts[rank], gate_TK, counts_E)
    kernels = kernels_for(case.model, x_TD.dtype)
    routed_TD, shared_TD = route(experts, x_TD, routing, kernels, lambda: (3 * x_TD).cos())
    assert shared_TD is not None
    y_TD = routed_TD + shared_TD
    y_TD.sin().sum().backward()
    gradients = {"x": x_TD.grad, "gate": gate_TK.grad, **{name: p.grad for name, p in experts.named_parameters()}}
    return {"y": y_TD.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def whole(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """The same on one rank that holds every expert, with the tokens of `rank`."""
    return through(LocalExperts(), case, rank)


def split(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """The same with the experts split over all ranks, and the bytes this rank sent, over any link and between nodes.

    Args:
        options: name of the route, and what it takes.
    """
    options = dict(options)
    transport, sliced = options.pop("transport", Transport()), options.pop("sliced", 1)
    mesh = _mesh(dist.get_world_size() // sliced, sliced)
    group, slices = mesh["expert"].get_group(), mesh["expert_tensor"].get_group()
    route = ROUTES[options.pop("name")](group, slices=SlicedExperts(slices) if sliced > 1 else None, **options)
    route.transport = transport
    held, width = case.model.n_routed_experts // group.size(), case.model.moe_intermediate_size // sliced
    experts = slice(group.rank() * held, (group.rank() + 1) * held)
    widths = slice(slices.rank() * width, (slices.rank() + 1) * width)
    with patch.dict(sys.modules, deep_ep=fake_deep_ep):
        found: dict[str, Any] = dict(through(route, case, dist.get_rank(), experts, widths))
    found["traffic"] = route.traffic.take()
    return found


def without_gradient(case: Case, options: dict[str, Any]) -> torch.Tensor:
    """The result where no gradient is asked for."""
    options = dict(options)
    world = dist.group.WORLD
    assert world is not None
    held = case.model.n_routed_experts // world.size()
    experts = StackedExperts(case.model)
    for name, weight in case.weights.items():
        setattr(experts, name, nn.Parameter(weight[world.rank() * held : (world.rank() + 1) * held].clone()))
    chosen = case.experts[world.rank()]
    counts_E = torch.bincount(chosen.flatten(), minlength=case.model.n_routed_experts)
    routing, x_TD = Routing(chosen, case.gate[world.rank()], counts_E), case.x[world.rank()]
    route = ROUTES[options.pop("name")](world, **options)
    with torch.no_grad():
        return route(experts, x_TD, routing, kernels_for(case.model, x_TD.dtype), lambda: None)[0]
