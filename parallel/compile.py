"""torch.compile for what a model declares: functions of their input and a weight, without collectives or effects.

Norms, today: they are all that `Decoder.plan` declares. Attention and feed-forward networks are not, since what their
kernels do (autograd functions of their own, some with outputs written in place) has not been tried under torch.compile;
nor is the exchange with experts, which waits for sizes. Compiled in training only: evaluation and generation have
shapes of many lengths, each of which would be compiled anew.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from octofold.backends.errors import ConfigError
from octofold.parallel.plan import ParallelPlan


def apply_compile(model: nn.Module, plan: ParallelPlan, device: str) -> None:
    """Compile the method `compute` of the modules that a plan calls `compiled`, in place.

    Args:
        device: type of the device that the model will be on.

    Raises:
        ConfigError: it is an NPU, or there is no C++ compiler.
    """
    if device == "npu":
        # Inductor makes Triton kernels for it, by a Triton of its own, which has not been tried.
        rule = "what would be compiled, the norms, is one operator of torch_npu on Ascend"
        raise ConfigError("parallel.compile", "parallel.compile=true backend=ascend", rule, "parallel.compile=false")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        rule = f"torch.compile needs a C++ compiler; {compiler} is not there"
        raise ConfigError("parallel.compile", "true", rule, "install g++, set CXX, or parallel.compile=false")
    for name in plan.compiled:
        module = model.get_submodule(name)
        plain = module.compute
        assert callable(plain)
        # One graph, so that nothing falls back to running uncompiled without a word.
        setattr(module, "compute", partial(_in_training, torch.compile(plain, fullgraph=True), plain))  # noqa: B010


Compute = Callable[[torch.Tensor], torch.Tensor]


def _in_training(compiled: Compute, plain: Compute, x: torch.Tensor) -> torch.Tensor:
    return compiled(x) if torch.is_grad_enabled() else plain(x)
