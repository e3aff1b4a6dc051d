"""What a model needs of a rank's memory, counted on the split model before anything is allocated.

Activations are not counted: what they need depends on kernels and allocator.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends.collectives import all_reduce_sum
from octofold.backends.errors import ConfigError
from octofold.parallel.plan import ParallelPlan


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
    """This rank's shards: master weights and, in training, their gradients and two moments."""
    gathered_bytes: int
    """Embedding, head and the largest layer whole, in the compute dtype; in training also their gradients."""

    @property
    def total_bytes(self) -> int:
        """Both, which a rank holds at once."""
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


def memory_need(model: nn.Module, plan: ParallelPlan, compute_dtype: torch.dtype, *, training: bool) -> MemoryNeed:
    """The need of a model that `apply_plan` has split (meta device)."""
    held = 4 if training else 1  # weight, gradient, two moments
    state_bytes = 0
    blocks = dict.fromkeys([*plan.blocks, ""], 0)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        state_bytes += parameter.to_local().numel() * parameter.element_size() * held
        block = next((b for b in plan.blocks if name.startswith(f"{b}.")), "")
        blocks[block] += _gathered_numel(parameter)
    root = blocks.pop("")
    gathered = (root + max(blocks.values(), default=0)) * compute_dtype.itemsize * (2 if training else 1)
    return MemoryNeed(state_bytes, gathered)


def _gathered_numel(parameter: DTensor) -> int:
    """Numbers that a rank holds while the layer computes: all of them, of experts those of this rank."""
    mesh = parameter.device_mesh
    axes = mesh.mesh_dim_names or ()
    return parameter.numel() // (mesh.size(axes.index("expert")) if "expert" in axes else 1)


def require_memory(
    name: str, count: ParameterCount, need: MemoryNeed, *, memory_bytes: int, ranks: int, device: torch.device
) -> None:
    """Refuse a model that does not fit. Collective: every rank takes the same decision.

    Args:
        name: of the model.
        memory_bytes: what this rank may use.
        ranks: that hold the state together.

    Raises:
        ConfigError: with the counts, the bytes needed and there, and how many ranks would do.
    """
    lacking = all_reduce_sum(torch.tensor([need.total_bytes > memory_bytes], dtype=torch.int64, device=device))
    if not lacking.item():
        return
    room = memory_bytes - need.gathered_bytes
    if room > 0:
        more = f"at least {-(-need.state_bytes * ranks // room)} ranks of this size hold it"
    else:
        more = "split the experts over more ranks (parallel.expert): a layer's must fit when they are gathered"
    shown = (
        f"model={name}: {count.total:,} parameters, {count.active:,} active, {count.mtp:,} more for multi-token "
        f"prediction, on {ranks} rank(s)"
    )
    rule = (
        f"a rank holds {gib(need.state_bytes)} of weights, gradients and moments and {gib(need.gathered_bytes)} of "
        f"gathered layers, beside activations; it has {gib(memory_bytes)}"
    )
    # The constructor shows a value that holds a "=" as it is.
    raise ConfigError("model", shown, rule, f"{more}; or a smaller model, such as model=deepseek_v3_tiny")


def gib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**30:,.1f} GiB"
