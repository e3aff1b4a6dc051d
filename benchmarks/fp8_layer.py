"""What the FP8 benchmarks of both devices share: a layer with experts as a training step runs it, and its kernels."""

from collections.abc import Callable

import torch
from torch import nn

from octofold.backends.collectives import Group
from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import Choice, Kernels, Workload, choose
from octofold.parallel.expert import FlatExperts
from octofold.train.build import fp8_workload
from octofold.train.models.config import ModelConfig
from octofold.train.models.moe import MixtureOfExperts
from octofold.train.precision.apply import apply_precision, forget_weights
from octofold.train.precision.config import PrecisionConfig


def chosen_kernels(
    shape: ModelConfig, precision: PrecisionConfig, device: torch.device
) -> tuple[Kernels, list[Choice]]:
    """What a run of this model would compute with on the device."""
    plain = Workload(device.type, dtype_of(precision), (shape.hidden_size, shape.moe_intermediate_size))
    names = ["experts.gate_up_proj", "experts.down_proj", "shared_experts.gate_proj"]
    return choose(KernelsConfig(), fp8_workload(plain, precision, names))


def dtype_of(precision: PrecisionConfig) -> torch.dtype:
    """What weights are gathered and tokens computed in."""
    return torch.float32 if precision.name == "fp32" else torch.bfloat16


def moe_step(
    shape: ModelConfig,
    precision: PrecisionConfig,
    device: torch.device,
    *,
    tokens: int,
    anew: bool,
    group: Group | None = None,
) -> Callable[[], None]:
    """A call that runs one layer of experts, shared ones included, forward and backward.

    Weights are BF16, as FSDP2 gathers them, or FP32 with that precision. Every contestant has the same weights, tokens
    and gradients, so the gate sends the same rows to the same experts.

    Args:
        anew: quantise the weights in every call, as a step of a single micro-batch does; else they are kept.
        group: ranks that share the experts, in equal parts and without overlap; None: this one has all.
    """
    torch.manual_seed(0)
    kernels, _ = chosen_kernels(shape, precision, device)
    with device:
        layer: nn.Module = MixtureOfExperts(shape, 0, kernels)
        if group is not None:
            layer.run_experts = FlatExperts(group, overlap=False)
            for name, stack in list(layer.experts.named_parameters(recurse=False)):
                share = stack.unflatten(0, (group.size(), -1))[group.rank()]
                layer.experts.register_parameter(name, nn.Parameter(share.detach().clone()))
        apply_precision(layer, precision, kernels)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=dtype_of(precision)) * shape.initializer_range
        size = (1, tokens, shape.hidden_size)
        x_BSD, grad_BSD = (torch.randn(size, dtype=dtype_of(precision)) for _ in range(2))
    x_BSD.requires_grad_()

    def step() -> None:
        if anew:
            forget_weights(layer)
        layer(x_BSD).backward(grad_BSD)
        for tensor in (x_BSD, *layer.parameters()):
            tensor.grad = None

    return step
