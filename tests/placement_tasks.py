"""What ranks do in the tests of where experts stand."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from octofold.parallel.config import ParallelConfig, resolve
from octofold.parallel.mesh import build_meshes
from octofold.parallel.placement_moves import move_rows


def moved_rows(expert: int, experts: int, sources: list[int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Stacks before and after a move, split by `expert` ranks along dim 0 and then by FSDP along either dim."""
    meshes = build_meshes(resolve(ParallelConfig(expert=expert), dist.get_world_size()), "cpu")
    whole = torch.arange(experts * 12.0).view(experts, 4, 3)
    found = {}
    for dim in (0, 1):
        module = nn.Module()
        split = distribute_tensor(whole.clone(), meshes.experts["expert"], [Shard(0)], src_data_rank=None)
        module.weight = nn.Parameter(split)
        fully_shard(module, mesh=meshes.experts["expert_data"], shard_placement_fn=lambda _, dim=dim: Shard(dim))
        assert isinstance(module.weight, DTensor)
        move_rows(module.weight.data, sources, meshes.whole["shard"].get_group())
        found[f"dim {dim}"] = (whole, module.weight.full_tensor().detach())
    return found
