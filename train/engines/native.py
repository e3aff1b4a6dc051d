"""The native engine: owns the optimiser step over parameters that FSDP2 shards."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from octofold.parallel.norm import global_norm


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    """Before clipping, over the whole model."""
    lr: float
    applied: bool
    """False: the norm was not finite, and every rank skipped the update."""


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers (expert biases) under the names a checkpoint gives them."""
    saved = model.state_dict().keys()  # less the buffers that are not kept
    # Each parameter once: a tied head has no name of its own here.
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    return {f"model.{name}": tensor.detach() for name, tensor in named}


class NativeEngine:
    """Backward, clip, update. `updates` counts the applied ones, which is what schedules go by."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        *,
        clip_norm: float,
        learning_rate: Callable[[int], float],
    ) -> None:
        """
        Args:
            clip_norm: bound of the global gradient norm; 0 switches clipping off.
            learning_rate: the rate of the update after so many applied ones.
        """
        self.model, self.optimizer = model, optimizer
        self.clip_norm, self.learning_rate = clip_norm, learning_rate
        self.updates = 0

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of one micro-batch; only the last one communicates them."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def step(self) -> StepResult:
        """Clip by the global norm, update, clear the gradients. Every rank takes the same decision."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = global_norm(gradients)
        grad_norm = float(norm)
        lr = self.learning_rate(self.updates)
        applied = bool(torch.isfinite(norm))
        if applied:
            if self.clip_norm and grad_norm > self.clip_norm:
                for gradient in gradients:
                    gradient.mul_(self.clip_norm / grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return StepResult(grad_norm, lr, applied)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimiser moments by name, for a checkpoint: DTensors that know their place in the whole.

        Moments that do not exist yet are made (zero), so that a checkpoint can be read into them.
        """
        named = model_tensors(self.model)
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                named[f"optim.{name}.{moment}"] = state[moment]
        return named

    def restore(self, updates: int) -> None:
        """Continue after `updates` applied updates, once the tensors have been read."""
        self.updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
