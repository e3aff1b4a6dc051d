"""Activation recompute: what the blocks of a model keep for the backward pass, and what they form again.

    none        everything is kept
    swiglu      outputs of SwiGLU are formed again from its inputs
    selective   those, the norms and what attention expands from its latents (DeepSeek-V3, section 3.2.3)
    full        only the input of each block is kept, and the whole block runs again, its exchanges too

What counts or watches (expert loads, balance losses, precision health) does so the first time only; bytes that a
repeated exchange sends are counted, since they are sent. Gradients are those without recompute, bit for bit.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from octofold.kernels.recompute import KINDS, Recomputing, second_time
from octofold.parallel.plan import ParallelPlan

SELECTIVE = {"swiglu": frozenset({"swiglu"}), "selective": frozenset(KINDS)}
"""By `parallel.recompute`: the kinds of functions that run again."""


def apply_recompute(model: nn.Module, plan: ParallelPlan, mode: str) -> None:
    """Make the blocks of a model recompute as `parallel.recompute` says, in place; before FSDP."""
    if mode == "none":
        return
    for name in plan.blocks:
        block = model.get_submodule(name)
        forward = block.forward
        wrapped = partial(_whole, forward) if mode == "full" else partial(_selective, forward, SELECTIVE[mode])
        setattr(block, "forward", wrapped)  # noqa: B010 - an instance's own forward, inside FSDP's hooks


def _whole(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        # Training draws no random numbers.
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), second_time()),
        # To the end on every rank: where it stops early must not decide which exchanges a rank takes part in.
        early_stop=False,
        **kwargs,
    )


def _selective(forward: Callable[..., Any], kinds: frozenset[str], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with Recomputing(kinds):
        return forward(*args, **kwargs)
