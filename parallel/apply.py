"""The one place that puts a plan on a model, in one visible order: tensor, experts, sequences, then FSDP.

FSDP2 owns FP32 (or FP64) master shards on every layout, one rank included, gathers them in the compute dtype and sums
gradients in the master dtype. No gradient is divided anywhere: the loss is already divided by the global token count.

A parameter's gradient is summed over every rank that computes with the same numbers on other tokens: of what tensor
ranks split, over data and context; of what they all have whole, over tensor too, since each sees other positions; of an
expert, over the ranks that hold the same expert. So each kind is sharded over a mesh of its own (parallel/mesh.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from octofold.backends.collectives import Group
from octofold.backends.errors import ConfigError
from octofold.parallel.compile import apply_compile
from octofold.parallel.config import ParallelConfig
from octofold.parallel.data import precision_policy
from octofold.parallel.expert import ExpertRoute
from octofold.parallel.mesh import Meshes
from octofold.parallel.plan import ParallelPlan
from octofold.parallel.recompute import apply_recompute
from octofold.parallel.sequence import SplitSequence

RouteMaker = Callable[[Group, Group], ExpertRoute]
"""The route to experts that are split over the first group, in slices over the second."""


def apply_plan(
    model: nn.Module,
    plan: ParallelPlan,
    meshes: Meshes,
    options: ParallelConfig,
    *,
    make_route: RouteMaker,
    compute_dtype: torch.dtype,
    master_dtype: torch.dtype,
) -> FSDPModule:
    """Split `model` (parameters on the meta device, in the master dtype) over the meshes, in place.

    Every parameter becomes a DTensor. A module that owns experts has an attribute `run_experts`, the route to them; it
    is replaced by one that reaches the experts of other ranks. So is the attribute `sequence` of modules that
    see tokens of other ranks.

    Raises:
        ConfigError: a dimension that the ranks of an axis do not divide.
    """
    _split_tensors(model, plan, meshes)
    _split_experts(model, plan, meshes, make_route)
    _split_sequences(model, plan, meshes)
    apply_recompute(model, plan, options.recompute)
    if options.compile:
        apply_compile(model, plan, meshes.dense.device_type)
    policy = precision_policy(options, compute_dtype=compute_dtype, master_dtype=master_dtype)
    shards = _Shards.over(model, plan, meshes)
    # Experts in a unit of their own: the rest of a block can compute while they are gathered.
    for name in [*plan.experts, *plan.blocks]:
        submodule = model.get_submodule(name)
        _shard(submodule, shards, mp_policy=policy, reshard_after_forward=options.reshard_after_forward)
    # What belongs to no block stays gathered: the backward pass begins with it.
    return _shard(model, shards, mp_policy=policy, reshard_after_forward=False)


def _split_tensors(model: nn.Module, plan: ParallelPlan, meshes: Meshes) -> None:
    if meshes.size("tensor") == 1:
        return
    split: dict[int, nn.Parameter] = {}  # a tied head is the embedding
    for name, dim in [*((name, 0) for name in plan.columns), *((name, 1) for name in plan.rows)]:
        module = model.get_submodule(name)
        weight = module.get_parameter("weight")
        if id(weight) not in split:
            split[id(weight)] = _distributed(f"{name}.weight", weight, meshes.split["tensor"], {"tensor": dim})
        module.weight = split[id(weight)]


def _split_experts(model: nn.Module, plan: ParallelPlan, meshes: Meshes, make_route: RouteMaker) -> None:
    expert, slices = meshes.experts.get_group("expert"), meshes.experts.get_group("expert_tensor")
    # Experts along E, their width along the dim that both stacks have it in: [E, 2, I, D] and [E, D, I].
    dims = {axis: dim for axis, dim in (("expert", 0), ("expert_tensor", 2)) if meshes.size(axis) > 1}
    for name in plan.experts:
        # Not a parameter, module or buffer, so setattr leaves torch's registries alone.
        route = make_route(expert, slices)
        setattr(model.get_submodule(name.rpartition(".")[0]), "run_experts", route)  # noqa: B010
        experts = model.get_submodule(name)
        for parameter_name, parameter in list(experts.named_parameters(recurse=False)) if dims else []:
            whole = f"{name}.{parameter_name}"
            split = _distributed(whole, parameter, meshes.experts[tuple(dims)], dims)
            experts.register_parameter(parameter_name, split)


def _distributed(name: str, parameter: nn.Parameter, mesh: DeviceMesh, dims: dict[str, int]) -> nn.Parameter:
    """`dims`: axis -> the dim it splits, in the order of the mesh's axes."""
    for axis, dim in dims.items():
        ranks, size = mesh[axis].size(), parameter.shape[dim]
        if size % ranks:
            shown = f"parallel.{axis}={ranks}"
            shape = list(parameter.shape)
            rule = f"every rank of the axis holds as much of {name} {shape}: it must divide dimension {dim}"
            legal = [d for d in range(1, size + 1) if size % d == 0]
            raise ConfigError(f"parallel.{axis}", shown, rule, f"parallel.{axis} one of {legal[:8]}, or another model")
    placements = [Shard(dim) for dim in dims.values()]
    # src_data_rank=None: nothing is sent; the values are made later, on each rank (train/models/init.py).
    return nn.Parameter(distribute_tensor(parameter.data, mesh, placements, src_data_rank=None))


def _split_sequences(model: nn.Module, plan: ParallelPlan, meshes: Meshes) -> None:
    if meshes.size("tensor") * meshes.size("context") == 1:
        return
    views = {"tensor": meshes.dense, "context": meshes.dense, "sequence": meshes.shared}
    sequence = SplitSequence(*(view.get_group(axis) for axis, view in views.items()))
    for name in plan.sequences:
        setattr(model.get_submodule(name), "sequence", sequence)  # noqa: B010


@dataclass(frozen=True)
class _Shards:
    """Which mesh FSDP shards a parameter over, and along which dim."""

    infos: dict[str, FSDPMeshInfo]
    kinds: dict[int, str]

    @staticmethod
    def over(model: nn.Module, plan: ParallelPlan, meshes: Meshes) -> "_Shards":
        """Of a model whose tensor and expert splits have been applied."""
        kinds: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            of_experts = name.rpartition(".")[0] in plan.experts
            kinds[id(parameter)] = "experts" if of_experts else "split" if isinstance(parameter, DTensor) else "whole"
        views = {
            "experts": (meshes.experts, "expert_data"),
            "split": (meshes.split, "shard"),
            "whole": (meshes.whole, "shard"),
        }
        infos: dict[str, FSDPMeshInfo] = {}
        for kind, (view, axis) in views.items():
            if meshes.size("data_replicate") == 1:
                infos[kind] = FSDPMeshInfo(view[axis], shard_mesh_dim=0)
            else:
                infos[kind] = HSDPMeshInfo(view["data_replicate", axis], shard_mesh_dim=1, replicate_mesh_dim=0)
        return _Shards(infos, kinds)

    def place(self, parameter: nn.Parameter) -> ShardPlacementResult:
        """FSDP2's `shard_placement_fn`."""
        info = self.infos[self.kinds[id(parameter)]]
        return ShardPlacementResult(Shard(_shard_dim(parameter, info.shard_mesh_size)), info)


def _shard_dim(parameter: nn.Parameter, ranks: int) -> int:
    """The first dim that the ranks divide; dim 0, in uneven shards, where there is none or nothing is split yet.

    FSDP2 takes uneven shards along dim 0 only, and what another axis splits along dim 0 is better cut evenly there.
    """
    if not isinstance(parameter, DTensor):
        return 0
    shape = parameter.to_local().shape
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def _shard(module: nn.Module, shards: _Shards, **choices: Any) -> FSDPModule:
    sharded = fully_shard(module, mesh=shards.infos["whole"].mesh, shard_placement_fn=shards.place, **choices)
    sharded.set_gradient_divide_factor(1.0)
    # A plain sum: the alternative (a scaled sum) exists in NCCL only.
    sharded.set_force_sum_reduction_for_comms(True)
    return sharded


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank computes with (what another axis splits stays split in the forward)."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
