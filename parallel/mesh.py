"""The job's ranks by kind of parallelism: a view for dense parameters and one for experts, over the same ranks."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octofold.backends.collectives import Group
from octofold.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Meshes:
    """Named meshes; `axis` names are those of the configuration."""

    dense: DeviceMesh
    """Axis data_shard: every rank, each reading its own sequences."""
    experts: DeviceMesh
    """Axes (expert_data, expert), expert innermost."""

    @property
    def expert_group(self) -> Group:
        """The ranks that together hold every expert once."""
        return self.experts["expert"].get_group()


def build_meshes(config: ParallelConfig, device_type: str) -> Meshes:
    """Meshes over the default process group. `config`: resolved degrees (`parallel.config.resolve`)."""
    dense = init_device_mesh(device_type, (config.data_shard,), mesh_dim_names=("data_shard",))
    experts = init_device_mesh(
        device_type, (config.expert_data, config.expert), mesh_dim_names=("expert_data", "expert")
    )
    return Meshes(dense, experts)
