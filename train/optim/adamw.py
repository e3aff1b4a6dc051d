"""AdamW over sharded master weights, with the parameter groups that language models use."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from octofold.train.config import OptimConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices; norms and the embedding are left out."""
    return parameter.ndim >= 2 and not name.startswith("embed_tokens")


def build_adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """One parameter group for each (mesh, decay): torch's fused step takes one mesh at a time."""
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, decays(name, parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0}
            for (_, decay), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
