"""What a model needs of a rank's memory, counted on the split model before anything is allocated.

Activations are not counted: what they need depends on kernels and allocator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends.collectives import all_reduce_sum
from octofold.backends.errors import ConfigError
from octofold.parallel.config import ParallelConfig
from octofold.parallel.plan import ParallelPlan
from octofold.train.optim.moments import moments_bytes

SPLITTING = ("tensor", "expert", "expert_tensor")
"""Axes along which a parameter stays split while it is computed with."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers in a model's parameters; a tied head counts once."""

    total: int
    """Of the main model, without multi-token prediction, as models are named by."""
    active: int
    """Those of `total` that one token passes through: its own experts, and the whole embedding and head."""
    mtp: int
    """What multi-token prediction adds; embedding and head are shared with the main model."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a rank must hold."""

    state_bytes: int
    """This rank's shards: master weights and, in training, their gradients and moments."""
    gathered_bytes: int
    """What is whole for a while: embedding, head and two layers (one computes, the next arrives) in the compute dtype,
    or all layers where they stay gathered; their gradients, or those of the whole model where micro-batches accumulate
    them unreduced; and the weights that are kept in FP8."""
    expert_bytes: int
    """Of `gathered_bytes` the experts, which a larger parallel.expert splits further."""
    accumulates: bool
    """Micro-batches add up whole gradients."""
    stays_gathered: bool = False
    """All layers, from their first forward pass to the end of the step."""
    kept_bytes: int = 0
    """Of `gathered_bytes` the weights that are kept in FP8 until the next update."""

    @property
    def total_bytes(self) -> int:
        """What a rank holds at once."""
        return self.state_bytes + self.gathered_bytes


def count_parameters(model: nn.Module, plan: ParallelPlan, active_share: float) -> ParameterCount:
    """Count an unsplit model.

    Args:
        active_share: experts a token ÷ experts.
    """
    main = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("mtp.")}
    mtp = sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp."))
    routed = sum(numel for name, numel in main.items() if name.rpartition(".")[0] in plan.experts)
    total = sum(main.values())
    return ParameterCount(total, total - routed + round(routed * active_share), mtp)


def memory_need(
    model: nn.Module,
    plan: ParallelPlan,
    options: ParallelConfig,
    compute_dtype: torch.dtype,
    *,
    moments: str | None,
    micro_batches: int,
    kept_copies: Mapping[str, int] | None = None,
) -> MemoryNeed:
    """The need of a model that `apply_plan` has split (meta device).

    Args:
        options: when weights are gathered and gradients reduced (parallel/data.py).
        moments: what they are kept in (`optim.moments`), beside gradients; None: not for training.
        micro_batches: of a step.
        kept_copies: parameters of which a rank keeps quantised copies of one byte a number, and how many.
    """
    state_bytes, master_bytes = 0, 4
    dense = dict.fromkeys([*plan.blocks, ""], 0)
    experts, kept = dict(dense), {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        master_bytes = parameter.element_size()
        numel = parameter.to_local().numel()
        state_bytes += numel * master_bytes
        if moments is not None:
            state_bytes += numel * master_bytes + moments_bytes(numel, moments, master_bytes)
        block = next((b for b in plan.blocks if name.startswith(f"{b}.")), "")
        of_experts = name.rpartition(".")[0] in plan.experts
        (experts if of_experts else dense)[block] += _gathered_numel(parameter)
        kept[of_experts] += _gathered_numel(parameter) * (kept_copies or {}).get(name, 0)
    accumulates = micro_batches > 1 and options.accumulate == "unreduced"
    stays = moments is not None and not options.reshard_after_forward
    reduce_bytes = 2 if options.reduce_dtype == "bf16" else master_bytes
    largest = max(plan.blocks, key=lambda b: dense[b] + experts[b])

    def gathered(numel: dict[str, int]) -> int:
        root, layer = numel[""], numel[largest]
        weights = (sum(numel.values()) if stays else root + 2 * layer) * compute_dtype.itemsize
        if moments is None:
            return weights
        if accumulates:
            return weights + sum(numel.values()) * reduce_bytes + layer * compute_dtype.itemsize
        # As computed, and once more in the dtype they are summed in, on the way to the ranks that own it.
        return weights + (root + layer) * (compute_dtype.itemsize + reduce_bytes)

    expert_bytes, kept_bytes = gathered(experts) + kept[True], sum(kept.values())
    gathered_bytes = gathered(dense) + kept[False] + expert_bytes
    return MemoryNeed(state_bytes, gathered_bytes, expert_bytes, accumulates, stays, kept_bytes)


def _gathered_numel(parameter: DTensor) -> int:
    """Numbers that a rank holds while the layer computes: all that no axis but data's splits."""
    mesh = parameter.device_mesh
    axes = mesh.mesh_dim_names or ()
    return parameter.numel() // prod(mesh.size(axes.index(axis)) for axis in SPLITTING if axis in axes)


def require_memory(
    name: str,
    count: ParameterCount,
    need: MemoryNeed,
    *,
    memory_bytes: int,
    ranks: int,
    expert: int,
    experts: int,
    device: torch.device,
) -> None:
    """Refuse a model that does not fit. Collective: every rank takes the same decision.

    Args:
        name: of the model.
        memory_bytes: what this rank may use.
        ranks: that hold the state together.
        expert: degree of expert parallelism.
        experts: routed experts of a layer.

    Raises:
        ConfigError: with the counts, the bytes needed and there, and how many ranks would do.
    """
    lacking = all_reduce_sum(torch.tensor([need.total_bytes > memory_bytes], dtype=torch.int64, device=device))
    if not lacking.item():
        return
    shown = (
        f"model={name}: {count.total:,} parameters, {count.active:,} active, {count.mtp:,} more for multi-token "
        f"prediction, on {ranks} rank(s)"
    )
    has = f"it has {readable(memory_bytes)}" + ("" if need.total_bytes > memory_bytes else ", others have less")
    waiting = "the unreduced gradients of all" if need.accumulates else "their gradients"
    rule = (
        f"a rank holds {readable(need.state_bytes)} of weights, gradients and moments and "
        f"{readable(need.gathered_bytes)} of gathered layers and {waiting}, beside activations; {has}"
    )
    # The constructor shows a value that holds a "=" as it is.
    more = ranks_needed(need, memory_bytes=memory_bytes, ranks=ranks, expert=expert, experts=experts)
    if need.accumulates:
        more += "; parallel.accumulate=reduced takes less and communicates more"
    if need.stays_gathered:
        more += "; parallel.reshard_after_forward=true takes less and communicates more"
    if need.kept_bytes:
        more += f"; precision.keep_weights=false takes {readable(need.kept_bytes)} less and more time"
    raise ConfigError("model", shown, rule, f"{more}; or a smaller model, such as model=deepseek_v3_tiny")


def ranks_needed(need: MemoryNeed, *, memory_bytes: int, ranks: int, expert: int, experts: int) -> str:
    """In words, how many ranks of this size hold the model; arguments as in `require_memory`."""
    degrees = [d for d in range(expert, experts + 1) if experts % d == 0 and d % expert == 0]
    for degree in degrees:
        gathered = need.gathered_bytes - need.expert_bytes + need.expert_bytes * expert // degree
        # More than half for what is gathered would ask for far more ranks than splitting the experts does.
        if gathered <= memory_bytes // 2 or (degree == degrees[-1] and gathered < memory_bytes):
            least = -(-need.state_bytes * ranks // (memory_bytes - gathered))
            least = -(-max(least, degree) // degree) * degree
            return f"at least {least} ranks of this size hold it, with parallel.expert={degree}"
    dense = readable(need.gathered_bytes - need.expert_bytes)
    return f"no number of ranks of this size holds it: {dense} are gathered without any experts"


def readable(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.1f} MiB"
