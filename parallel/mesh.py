"""The job's ranks by kind of parallelism: several views of the same ranks, each a named mesh.

A stage of the pipeline and a replica of the data are the same ranks in every view. What is inside them is seen as

    dense      data_shard x context x tensor
    experts    expert_data x expert x expert_tensor

outermost first, so that the innermost axes are neighbouring ranks, which share the fastest links.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from octofold.backends.collectives import Group, share_timeout
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig


@dataclass(frozen=True)
class Meshes:
    """Named meshes over the default process group; `axis` names are those of the configuration."""

    dense: DeviceMesh
    """Axes (pipeline, data_replicate, data_shard, context, tensor)."""
    experts: DeviceMesh
    """Axes (pipeline, data_replicate, expert_data, expert, expert_tensor)."""
    split: DeviceMesh
    """Axes (pipeline, data_replicate, shard, tensor): what holds shards of a parameter that tensor splits."""
    whole: DeviceMesh
    """Axes (pipeline, data_replicate, shard): what holds shards of a parameter that nothing else splits. Every rank
    computes with all of it, on tokens of its own."""
    shared: DeviceMesh
    """Axes (pipeline, data_replicate, data_shard, sequence): the ranks that share the positions of a sequence."""

    def size(self, axis: str) -> int:
        """Degree of an axis of `dense` or `experts`."""
        view, number = self._place(axis)
        return view.size(number)

    def rank(self, axis: str) -> int:
        """This rank's coordinate on an axis of `dense` or `experts`."""
        view, number = self._place(axis)
        return view.get_local_rank(number)

    def _place(self, axis: str) -> tuple[DeviceMesh, int]:
        """The view that has an axis, and its number there: a mesh of the axis alone takes milliseconds to make."""
        view = self.dense if axis in (self.dense.mesh_dim_names or ()) else self.experts
        assert view.mesh_dim_names is not None
        return view, view.mesh_dim_names.index(axis)

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        return self.rank("data_replicate") * self.size("data_shard") + self.rank("data_shard")

    @property
    def speaks(self) -> bool:
        """Of the ranks that hold the same positions of the same sequences (tensor, pipeline), is this the first?

        A sum over the world counts what is known to all of them on this one.
        """
        return self.rank("tensor") == 0 and self.rank("pipeline") == 0

    @property
    def whole_model(self) -> bool:
        """Does a rank compute every layer, over all positions and all of its width (experts aside)?"""
        return self.size("pipeline") == 1 and self.shared.get_group("sequence").size() == 1


_built: WeakKeyDictionary[Group, dict[tuple[object, ...], Meshes]] = WeakKeyDictionary()
"""By default process group. Groups live as long as the process group, and each of gloo's costs three threads."""


def build_meshes(config: ParallelConfig, device_type: str) -> Meshes:
    """Meshes over the default process group, the same ones whenever they are asked for again.

    Args:
        config: resolved degrees (`parallel.config.resolve`).
    """
    assert dist.group.WORLD is not None
    built = _built.setdefault(dist.group.WORLD, {})
    key = (device_type, *(getattr(config, name) for name in (*DENSE_DEGREES, "expert", "expert_tensor")))
    if key not in built:
        built[key] = _build(config, device_type)
    return built[key]


def _build(config: ParallelConfig, device_type: str) -> Meshes:
    # One root for all views: FSDP2 joins the mesh that holds shards with the one that splits a parameter. Each view
    # splits an axis of another and keeps the groups of the rest: a group is a rendezvous of all ranks, and threads.
    world = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("world",))
    data, context, tensor = config.data_shard, config.context, config.tensor
    whole = _unflattened(
        world,
        "world",
        pipeline=config.pipeline,
        data_replicate=config.data_replicate,
        shard=data * context * tensor,
    )
    shared = _unflattened(whole, "shard", data_shard=data, sequence=context * tensor)
    meshes = Meshes(
        dense=_unflattened(shared, "sequence", context=context, tensor=tensor),
        experts=_unflattened(
            whole,
            "shard",
            expert_data=config.expert_data,
            expert=config.expert,
            expert_tensor=config.expert_tensor,
        ),
        split=_unflattened(whole, "shard", shard=data * context, tensor=tensor),
        whole=whole,
        shared=shared,
    )
    for mesh in vars(meshes).values():
        for group in mesh.get_all_groups():
            share_timeout(group)
    return meshes


def _unflattened(mesh: DeviceMesh, axis: str, **axes: int) -> DeviceMesh:
    """The mesh with one axis as several, outermost first."""
    return mesh._unflatten(axis, tuple(axes.values()), tuple(axes))
