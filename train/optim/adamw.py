"""AdamW over sharded master weights, with the parameter groups that language models use."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.tensor import DTensor

from octofold.backends.base import Capabilities
from octofold.backends.errors import ConfigError
from octofold.train.config import OptimConfig
from octofold.train.optim.moments import AdamW, CompactAdamW


def decays(name: str, no_decay: list[str]) -> bool:
    """Whether weight decay applies to a parameter: its name matches none of the patterns."""
    return not any(fnmatchcase(name, pattern) for pattern in no_decay)


def require_moments(optim: OptimConfig, capabilities: Capabilities) -> None:
    """Refuse moments in FP8 where the device cannot cast to it: AdamW has no provider that would do without.

    Raises:
        ConfigError: with the device and the remedy.
    """
    if optim.moments == "fp8" and not capabilities.casts_fp8:
        rule = f"{capabilities.device_name} does not cast to FP8, which every update does for them"
        raise ConfigError("optim.moments", optim.moments, rule, "optim.moments=bf16")


def build_adamw(model: nn.Module, optim: OptimConfig, names: Sequence[str] | None = None) -> AdamW:
    """One parameter group for each (mesh, decay): torch's fused step takes one mesh at a time.

    Args:
        optim: `moments` chooses what the moments are kept in.
        names: of the whole model's parameters, where `model` has some of them only.

    Raises:
        ConfigError: a pattern of `optim.no_decay` matches no parameter.
    """
    names = names or [name for name, _ in model.named_parameters()]
    for pattern in optim.no_decay:
        if all(decays(name, [pattern]) for name in names):
            rule = "every pattern matches some parameter, else it would silently do nothing"
            raise ConfigError("optim.no_decay", pattern, rule, f"patterns of names such as {names[0]} or {names[1]}")
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, decays(name, optim.no_decay)), []).append(parameter)
    parts = [
        {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0}
        for (_, decay), parameters in groups.items()
    ]
    betas = (optim.beta1, optim.beta2)
    if optim.moments == "fp32":
        return AdamW(parts, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    return CompactAdamW(parts, kind=optim.moments, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
