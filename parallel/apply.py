"""The one place that puts a plan on a model, in one visible order: experts, then FSDP.

FSDP2 owns FP32 (or FP64) master shards on every layout, one rank included, gathers them in the compute dtype and sums
gradients in the master dtype. No gradient is divided anywhere: the loss is already divided by the global token count.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from octofold.parallel.expert import ExchangedExperts
from octofold.parallel.mesh import Meshes
from octofold.parallel.plan import ParallelPlan


def apply_plan(
    model: nn.Module, plan: ParallelPlan, meshes: Meshes, *, compute_dtype: torch.dtype, master_dtype: torch.dtype
) -> FSDPModule:
    """Split `model` (parameters on the meta device, in the master dtype) over the meshes, in place.

    Every parameter becomes a DTensor. A module that owns experts has an attribute `run_experts`; where experts are
    split it is replaced by one that reaches the experts of other ranks.
    """
    _split_experts(model, plan, meshes)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != master_dtype else None,
        reduce_dtype=master_dtype,
        cast_forward_inputs=False,
    )
    for name in plan.experts:
        _shard(model.get_submodule(name), meshes.experts["expert_data"], policy)
    for name in plan.blocks:
        _shard(model.get_submodule(name), meshes.dense["data_shard"], policy)
    return _shard(model, meshes.dense["data_shard"], policy)


def _split_experts(model: nn.Module, plan: ParallelPlan, meshes: Meshes) -> None:
    mesh = meshes.experts["expert"]
    for name in plan.experts:
        if mesh.size() == 1:
            continue
        # Not a parameter, module or buffer, so setattr leaves torch's registries alone.
        setattr(model.get_submodule(name.rpartition(".")[0]), "run_experts", ExchangedExperts(mesh.get_group()))  # noqa: B010
        experts = model.get_submodule(name)
        for parameter_name, parameter in list(experts.named_parameters(recurse=False)):
            # src_data_rank=None: nothing is sent; the values are made later, on each rank (train/models/init.py).
            split = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(parameter_name, nn.Parameter(split))


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> FSDPModule:
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    # A plain sum: the alternative (a scaled sum) exists in NCCL only.
    sharded.set_force_sum_reduction_for_comms(True)
    return sharded


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank computes with (experts stay split along E inside the forward pass)."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
