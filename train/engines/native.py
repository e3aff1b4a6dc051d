"""The native engine: owns the optimiser step over parameters that FSDP2 shards, and the scale of the loss."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from octofold.kernels.fp8 import HISTORY
from octofold.parallel.config import ParallelConfig
from octofold.parallel.data import begin_backward
from octofold.parallel.norm import global_norm
from octofold.parallel.pipeline_ends import SharedEnds
from octofold.train.precision.loss_scale import LossScaler


class Optimizer(Protocol):
    """What the engine steps: a torch optimiser that shows its moments (train/optim/moments.py)."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[torch.Tensor, Any]

    def step(self) -> Any:
        """Update every parameter from its gradient."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of a parameter by name, placed like it; they are read and written before the next step."""


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did."""

    grad_norm: float
    """Of the true gradients, before clipping, over the whole model."""
    lr: float
    applied: bool
    """False: every rank skipped the update, since the norm was not finite or a judge was against it."""
    loss_scale: float
    """What the loss was multiplied by, and the gradients divided by."""


def model_tensors(model: nn.Module, *, without: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names a checkpoint gives them.

    `model.…` for what makes up the model (expert biases too), `precision.…` for the state of FP8 recipes.

    Args:
        without: a parameter that another one of the same name stands for.
    """
    # Each parameter once: a tied head has no name of its own here.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter is not without]
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                named.append((name, buffer))
    return {f"{'precision' if name.endswith(HISTORY) else 'model'}.{name}": tensor.detach() for name, tensor in named}


class NativeEngine:
    """Backward, unscale and clip, update. `updates` counts the applied ones, which is what schedules go by."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: LossScaler,
        *,
        clip_norm: float,
        learning_rate: Callable[[int], float],
        parallel: ParallelConfig | None = None,
        ends: SharedEnds | None = None,
    ) -> None:
        """
        Args:
            clip_norm: bound of the global gradient norm; 0 switches clipping off.
            learning_rate: the rate of the update after so many applied ones.
            parallel: what each micro-batch communicates (parallel/data.py); None: as by default.
            ends: the parameter of which the last stage of a pipeline has a copy.
        """
        self.model, self.optimizer, self.scaler, self.parallel = model, optimizer, scaler, parallel or ParallelConfig()
        self.clip_norm, self.learning_rate = clip_norm, learning_rate
        self.ends = ends
        self._copied = None if ends is None else ends.copied
        self.updates = 0
        self.keep_squares = False
        """Whether `squares` is kept."""
        self.squares: dict[torch.Tensor, torch.Tensor] = {}
        """Parameter -> this rank's part of the square of its gradient's norm as last measured, scaled; FP64 scalars."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of one micro-batch, times the loss scale; `last`: of the step.

        A loss that enters the backward pass by another way (a gate's balance losses) is scaled by its owner.
        """
        assert isinstance(self.model, FSDPModule)
        begin_backward(self.model, self.parallel, last=last)
        (loss * self.scaler.scale).backward()

    def measure(self) -> float:
        """Sum up what makes a gradient, once a step; the norm of the true gradients, equal on every rank."""
        if self.ends is not None:
            self.ends.sum_gradients()
        named = [(p, p.grad) for p in self.model.parameters() if p.grad is not None and p is not self._copied]
        squares: list[torch.Tensor] | None = [] if self.keep_squares else None
        norm = float(global_norm((grad for _, grad in named), squares)) / self.scaler.scale
        self.squares = dict(zip((p for p, _ in named), squares, strict=True)) if squares is not None else {}
        return norm

    def step(self, allows: Callable[[float], bool] = math.isfinite) -> StepResult:
        """Unscale, clip by the global norm, update, clear the gradients. Every rank takes the same decision.

        The norm is one sum over the world, so a gradient that is not finite on one rank skips the update on all.

        Args:
            allows: given the norm, whether the update is applied; alike on every rank.
        """
        scale, grad_norm = self.scaler.scale, self.measure()
        lr = self.learning_rate(self.updates)
        applied = allows(grad_norm)
        if applied:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            bound = self.clip_norm or math.inf
            # One multiplication does both: a gradient in BF16 is rounded once.
            factor = (bound / grad_norm if grad_norm > bound else 1.0) / scale
            if factor != 1:
                for gradient in gradients:
                    gradient.mul_(factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        if applied or not math.isfinite(grad_norm):
            self.scaler.update(applied=applied)
        return StepResult(grad_norm, lr, applied, scale)

    def alike(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """The parameter and its moments, placed like it; what is written into them counts from the next step on."""
        return [parameter, *self.optimizer.moments(parameter).values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimiser moments by name, for a checkpoint: DTensors that know their place in the whole.

        Moments that do not exist yet are made (zero), so that a checkpoint can be read into them; they are to be
        filled before the next step.
        """
        named = model_tensors(self.model, without=self._copied)
        for name, parameter in self.model.named_parameters():
            if parameter is self._copied:
                continue
            for moment, tensor in self.optimizer.moments(parameter).items():
                named[f"optim.{name}.{moment}"] = tensor
        return named

    def updated(self, tensors: Iterable[str]) -> set[str]:
        """Names of those among `tensors()` that nothing but `step` changes: parameters and moments, not buffers."""
        parameters = {f"model.{name}" for name, _ in self.model.named_parameters()}
        return {name for name in tensors if name in parameters or name.startswith("optim.")}

    def restore(self, updates: int, loss_scale: dict[str, Any] | None) -> None:
        """Continue after `updates` applied updates, once the tensors have been read.

        Args:
            loss_scale: the state of the scaler; None where a checkpoint has none: it begins as configured.
        """
        self.updates = updates
        if self.ends is not None:
            self.ends.follow(self._with_moments(self.ends.original), self._with_moments(self.ends.copied))
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
        if loss_scale is not None:
            self.scaler.load_state_dict(loss_scale)

    def _with_moments(self, parameter: torch.Tensor | None) -> list[torch.Tensor]:
        return [] if parameter is None else [parameter, *self.optimizer.moments(parameter).values()]
