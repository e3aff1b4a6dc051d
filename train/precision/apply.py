"""Puts the precision policy on a model: FP8 states into the slots that its modules have, formats on what travels."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from octofold.backends.collectives import all_reduce_max
from octofold.backends.errors import ConfigError
from octofold.kernels.fp8 import TENSOR_KINDS, Fp8State
from octofold.kernels.registry import Kernels
from octofold.parallel.expert import ExchangedExperts
from octofold.parallel.transport import COUNTED
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.policy import recipe_for, transport_for


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of everything that may be in FP8; experts have two in one module."""
    for name, module in model.named_modules():
        for suffix, attribute in getattr(module, "FP8_SLOTS", {}).items():
            yield ".".join(part for part in (name, suffix) if part), module, attribute


def apply_precision(
    model: nn.Module, precision: PrecisionConfig, kernels: Kernels, *, turned_copies: bool = False
) -> None:
    """Fill the slots of the modules that the policy puts in FP8.

    Args:
        turned_copies: see `Fp8State`.

    Raises:
        ConfigError: an override matches no module.
    """
    names = [name for name, _, _ in slots(model)]
    for index, override in enumerate(precision.overrides):
        alone = PrecisionConfig(overrides=[override])
        if all(alone.of_module(name) is alone for name in names):
            rule = "every override matches some linear layer, else it would silently do nothing"
            shown = f"precision.overrides[{index}].match={override.match}"
            raise ConfigError("precision.overrides", shown, rule, f"patterns of names such as {names[1]}, {names[-1]}")
    for name, module, attribute in list(slots(model)):
        recipe = recipe_for(precision, name)
        if recipe is not None:
            state = Fp8State(
                recipe,
                kernels,
                keep_weights=precision.keep_weights,
                amax_history=precision.amax_history,
                turned_copies=turned_copies,
            )
            setattr(module, attribute, state)


def apply_transport(model: nn.Module, precision: PrecisionConfig) -> None:
    """Tell the experts that stand on several ranks what tokens travel as; after the plan has been applied."""
    for name, module in model.named_modules():
        run = getattr(module, "run_experts", None)
        if isinstance(run, ExchangedExperts):
            run.transport = transport_for(precision, f"{name}.experts")


def fp8_states(model: nn.Module) -> dict[str, Fp8State]:
    """Module name -> state, of everything in FP8."""
    found = {name: getattr(module, attribute) for name, module, attribute in slots(model)}
    return {name: state for name, state in found.items() if state is not None}


def kept_copies(model: nn.Module) -> dict[str, int]:
    """Parameter name -> how many quantised copies of its gathered self a rank keeps between updates."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied head's is the embedding's
    copies = {}
    for name, module, attribute in slots(model):
        state = getattr(module, attribute)
        if state is None or not state.keep_weights or state.recipe.arithmetic != "product":
            continue
        if not isinstance(module, nn.Embedding):  # whose rows are only rounded
            weight = getattr(module, name.rpartition(".")[2], None)
            parameter = weight if isinstance(weight, nn.Parameter) else module.weight
            copies[names[id(parameter)]] = 2 if state.turned_copies else 1
    return copies


def reset_states(model: nn.Module) -> None:
    """Zero the histories of delayed scaling (a model made on the meta device has none) and drop kept weights."""
    for state in fp8_states(model).values():
        state.forget()
        for buffer in state.buffers():
            buffer.zero_()


def set_loss_scale(model: nn.Module, scale: float) -> None:
    """Tell delayed scaling what gradients are multiplied by in the step that begins."""
    for state in fp8_states(model).values():
        state.loss_scale = scale


def forget_weights(model: nn.Module) -> None:
    """The weights have changed."""
    for state in fp8_states(model).values():
        state.forget()


@torch.no_grad()
def roll_histories(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Delayed scaling: the largest magnitudes of this step, over all ranks, become the newest of the history.

    Collective over the default group where some recipe is delayed, which is alike on all ranks. A magnitude that is not
    finite (a batch that is skipped) is not remembered.

    Args:
        names: of all modules of the whole model whose recipe is delayed; None: they are all on this rank.
    """
    delayed = {name: state for name, state in fp8_states(model).items() if state.recipe.delayed}
    rows = {name: row for row, name in enumerate(delayed if names is None else names)}
    if not rows:
        return
    amax_SK = torch.zeros(len(rows), len(TENSOR_KINDS), device=next(model.parameters()).device)
    for name, state in delayed.items():
        amax_SK[rows[name]] = torch.where(torch.isfinite(state.amax_K), state.amax_K, 0.0)
    all_reduce_max(amax_SK)
    for name, state in delayed.items():
        state.remember(amax_SK[rows[name]])


def take_traffic(model: nn.Module) -> torch.Tensor:
    """What this rank's experts have counted since last asked, FP64 in the order of `COUNTED`."""
    counted = torch.zeros(len(COUNTED), dtype=torch.float64)
    for module in model.modules():
        run = getattr(module, "run_experts", None)
        if isinstance(run, ExchangedExperts):
            taken = run.traffic.take()
            counted += torch.tensor([taken.get(name, 0.0) for name in COUNTED], dtype=torch.float64)
    return counted
