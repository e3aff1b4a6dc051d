"""Data parallelism as the `parallel` group asks for it: when FSDP2 gathers weights, when and in what it sums gradients.

                                 weights gathered       gradients reduced    whole on every rank
    the default (ZeRO-3)         twice a micro-batch    once a step          gradients, over several micro-batches
    reshard_after_forward=false  once a step            once a step          weights; gradients as above (ZeRO-1)
    accumulate=reduced           as said above          once a micro-batch   weights or nothing (ZeRO-2, ZeRO-3)

Of experts "whole" means those of this rank. The default never communicates more than a step needs; what it costs is
memory, so that a model that does not fit is refused with `accumulate=reduced` among the remedies (train/memory.py).
Between replicas of the data gradients are summed once a step in any case.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from octofold.parallel.config import ParallelConfig


def precision_policy(
    options: ParallelConfig, *, compute_dtype: torch.dtype, master_dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """In what weights are gathered and gradients summed; shards are held, and added up, in the master dtype."""
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != master_dtype else None,
        reduce_dtype=torch.bfloat16 if options.reduce_dtype == "bf16" else master_dtype,
        cast_forward_inputs=False,
    )


def begin_backward(model: FSDPModule, options: ParallelConfig, *, last: bool) -> None:
    """Say what the next backward pass communicates.

    Args:
        last: it belongs to the last micro-batch of a step.
    """
    model.set_requires_gradient_sync(last or options.accumulate == "reduced")
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or options.reshard_after_forward)


def let_go(model: nn.Module) -> None:
    """Release weights that a forward pass without a backward pass has left gathered: parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
