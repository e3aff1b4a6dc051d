"""The commonest silent faults of parallel training, planted around a run on every rank: tasks like `record`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

import octofold.parallel.apply
import octofold.parallel.norm
from octofold.backends.hierarchical import HierarchicalSum
from octofold.parallel.pipeline_ends import SharedEnds
from octofold.train.config import RunConfig
from octofold.train.layout.facts import RankFacts
from octofold.train.layout.record import record
from octofold.train.loss import valid_tokens
from octofold.train.models.gate import TopKGate
from octofold.train.models.mtp import MtpDepth
from octofold.train.trainer import Schedule, Trainer


class _Reduce(ReduceScatter):
    """A reduce-scatter that adds up `times` what it should; 0: every rank keeps its own contribution."""

    def __init__(self, times: int) -> None:
        self.times = times

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        if self.times:
            dist.reduce_scatter_tensor(output_tensor, input_tensor * self.times, group=group)
        else:
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


def _experts_reduced(times: int, config: RunConfig, run_dir: Path) -> RankFacts:
    apply_plan = octofold.parallel.apply.apply_plan

    def faulty(model: Any, plan: Any, *args: Any, **options: Any) -> Any:
        applied = apply_plan(model, plan, *args, **options)
        for name in plan.experts:
            experts = model.get_submodule(name)
            assert isinstance(experts, FSDPModule)
            experts.set_custom_reduce_scatter(_Reduce(times))
        return applied

    with patch("octofold.train.build.apply_plan", faulty):
        return record(config, run_dir)


def experts_not_summed(config: RunConfig, run_dir: Path) -> RankFacts:
    """The gradients of experts are not summed over the ranks that hold shards of the same experts."""
    return _experts_reduced(0, config, run_dir)


def experts_summed_twice(config: RunConfig, run_dir: Path) -> RankFacts:
    """The gradients of experts are summed once too often."""
    return _experts_reduced(2, config, run_dir)


def hierarchical_sums_doubled(config: RunConfig, run_dir: Path) -> RankFacts:
    """What is summed by steps inside and between nodes comes out twice as large."""
    summed = HierarchicalSum.__call__

    def doubled(self: HierarchicalSum, tensor: torch.Tensor) -> torch.Tensor:
        return summed(self, tensor).mul_(2)

    with patch.object(HierarchicalSum, "__call__", doubled):
        return record(config, run_dir)


def bias_from_local_counts(config: RunConfig, run_dir: Path) -> RankFacts:
    """Each rank moves the expert biases by the loads that it saw itself."""

    def local(loads: list[torch.Tensor]) -> torch.Tensor:
        loads_GE = torch.stack(loads).to(torch.float64)
        for load in loads:
            load.zero_()
        return loads_GE

    with patch("octofold.train.trainer.gather_loads", local):
        return record(config, run_dir)


def _tokens(counted: Callable[[torch.Tensor], torch.Tensor], config: RunConfig, run_dir: Path) -> RankFacts:
    accumulate = Trainer._accumulate

    def faulty(self: Trainer, batches: Any, tokens_J: torch.Tensor, *rest: Any) -> Any:
        own = [[valid_tokens(labels) for _, labels in self.accumulation._targets(batch)] for batch in batches]
        return accumulate(self, batches, counted(torch.tensor(own).sum(0).to(tokens_J)), *rest)

    with patch.object(Trainer, "_accumulate", faulty):
        return record(config, run_dir)


def divided_by_local_tokens(config: RunConfig, run_dir: Path) -> RankFacts:
    """Each rank divides its loss by its own valid tokens."""
    return _tokens(lambda own_J: own_J, config, run_dir)


def mean_of_local_means(config: RunConfig, run_dir: Path) -> RankFacts:
    """Each rank divides its loss by its own valid tokens, and gradients are averaged."""
    return _tokens(lambda own_J: own_J * dist.get_world_size(), config, run_dir)


def mtp_gradient_dropped(config: RunConfig, run_dir: Path) -> RankFacts:
    """The loss of multi-token prediction is reported and takes no part in the backward pass."""
    schedule = Trainer._schedule
    with patch.object(Trainer, "_schedule", lambda self: Schedule(0.0, schedule(self).bias_update_rate)):
        return record(config, run_dir)


def mtp_block_detached(config: RunConfig, run_dir: Path) -> RankFacts:
    """What multi-token prediction computes is cut off from the gradient, head and embedding are not."""
    forward = MtpDepth.forward
    with patch.object(MtpDepth, "forward", lambda self, *args, **options: forward(self, *args, **options).detach()):
        return record(config, run_dir)


def norm_counts_experts_twice(config: RunConfig, run_dir: Path) -> RankFacts:
    """The global norm takes the shards of experts for two."""
    copies = octofold.parallel.norm.copies_in_world

    def faulty(gradient: DTensor) -> float:
        names = gradient.device_mesh.mesh_dim_names or ()
        return copies(gradient) / (2 if "expert_data" in names else 1)

    with patch("octofold.parallel.norm.copies_in_world", faulty):
        return record(config, run_dir)


def norm_weights_not_summed_over_tensor(config: RunConfig, run_dir: Path) -> RankFacts:
    """Tensor ranks sum the gradients of what they all have whole over data and context ranks alone."""
    shards = octofold.parallel.apply._Shards
    over = shards.over

    def faulty(*args: Any) -> Any:
        right = over(*args)
        return replace(right, infos={**right.infos, "whole": right.infos["split"]})

    with patch.object(shards, "over", staticmethod(faulty)):
        return record(config, run_dir)


def embedding_not_summed_over_ends(config: RunConfig, run_dir: Path) -> RankFacts:
    """The first and the last stage of a pipeline keep the gradients of their own copies of the embedding."""
    with patch.object(SharedEnds, "sum_gradients", lambda ends: None):
        return record(config, run_dir)


def sums_in_an_order_of_their_own(config: RunConfig, run_dir: Path) -> RankFacts:
    """Two sums over the world, begun by every second rank the other way round: gloo bears it, NCCL would hang."""
    groups = [dist.new_group(group_desc=name) for name in ("first", "second")]
    forward = TopKGate.forward

    def faulty(gate: TopKGate, *args: Any) -> Any:
        mine = groups if dist.get_rank() % 2 else groups[::-1]
        for work in [dist.all_reduce(torch.ones(3), group=group, async_op=True) for group in mine]:
            assert work is not None
            work.wait()
        return forward(gate, *args)

    try:
        with patch.object(TopKGate, "forward", faulty):
            return record(config, run_dir)
    finally:
        for group in groups:
            dist.destroy_process_group(group)


def balance_loss_lost_on_a_rank(config: RunConfig, run_dir: Path) -> RankFacts:
    """The last rank computes its balance losses, and they reach no gradient."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return record(config, run_dir)
    with patch("octofold.train.models.gate.inject", lambda carrier, loss, scale: carrier):
        return record(config, run_dir)
