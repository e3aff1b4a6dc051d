"""Which provider computes which op: chosen once at start, with the reason for every rejection.

To add a provider for an existing op: write the function in a file of its own, add a line here, and hold it to the
reference in tests/test_kernels_providers.py (docs/extending.md). A provider of your own needs no line: name it as
package.module:function, with `why_unsupported` beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from octofold.backends.dotted import is_dotted, load_dotted
from octofold.backends.errors import ConfigError, unknown_name_error
from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import Format, QTensor

PROVIDERS: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "octofold.kernels.cpu_attention",
        "npu": "octofold.kernels.npu.attention",
        "torch": "octofold.kernels.torch_attention",
        "reference": "octofold.kernels.reference.attention",
    },
    "grouped_mm": {
        "cpu": "octofold.kernels.cpu_grouped_mm",
        "npu": "octofold.kernels.npu.grouped_mm",
        "torch": "octofold.kernels.torch_grouped_mm",
        "reference": "octofold.kernels.reference.grouped_mm",
    },
    "rms_norm": {
        "cpu": "octofold.kernels.cpu_rms_norm",
        "npu": "octofold.kernels.npu.rms_norm",
        "torch": "octofold.kernels.torch_rms_norm",
        "reference": "octofold.kernels.reference.rms_norm",
    },
    "rotary": {
        "npu": "octofold.kernels.npu.rotary",
        "torch": "octofold.kernels.torch_rotary",
        "reference": "octofold.kernels.reference.rotary",
    },
    "swiglu": {
        "npu": "octofold.kernels.npu.swiglu",
        "torch": "octofold.kernels.torch_swiglu",
        "reference": "octofold.kernels.reference.swiglu",
    },
    "gate_topk": {
        "npu": "octofold.kernels.npu.gate_topk",
        "reference": "octofold.kernels.reference.gate_topk",
    },
    "permute": {
        "triton": "octofold.kernels.triton_permute",
        "npu": "octofold.kernels.npu.permute",
        "torch": "octofold.kernels.torch_permute",
        "reference": "octofold.kernels.reference.permute",
    },
    "unpermute": {
        "triton": "octofold.kernels.triton_permute",
        "npu": "octofold.kernels.npu.permute",
        "torch": "octofold.kernels.torch_permute",
        "reference": "octofold.kernels.reference.permute",
    },
    "quantize": {
        "npu": "octofold.kernels.npu.quantize",
        "cpu": "octofold.kernels.cpu_quantize",
        "triton": "octofold.kernels.triton_quantize",
        "bytes": "octofold.kernels.bytes_quantize",
        "reference": "octofold.kernels.reference.quantize",
    },
    "quantize_groups": {
        "npu": "octofold.kernels.npu.quantize",
        "cpu": "octofold.kernels.cpu_quantize",
        "triton": "octofold.kernels.triton_quantize",
        "bytes": "octofold.kernels.bytes_quantize",
        "reference": "octofold.kernels.reference.quantize",
    },
    "swiglu_quantize": {
        "npu": "octofold.kernels.npu.quantize",
        "cpu": "octofold.kernels.cpu_quantize",
        "triton": "octofold.kernels.triton_quantize",
        "bytes": "octofold.kernels.bytes_quantize",
        "reference": "octofold.kernels.reference.quantize",
    },
    "dequantize": {
        "cpu": "octofold.kernels.cpu_scaled_mm",
        "bytes": "octofold.kernels.bytes_scaled_mm",
        "reference": "octofold.kernels.reference.scaled_mm",
    },
    "scaled_mm": {
        "npu": "octofold.kernels.npu.scaled_mm",
        "triton": "octofold.kernels.triton_scaled_mm",
        "cpu": "octofold.kernels.cpu_scaled_mm",
        "torch": "octofold.kernels.torch_scaled_mm",
        "bytes": "octofold.kernels.bytes_scaled_mm",
        "reference": "octofold.kernels.reference.scaled_mm",
    },
    "scaled_grouped_mm": {
        "npu": "octofold.kernels.npu.scaled_mm",
        "triton": "octofold.kernels.triton_scaled_mm",
        "cpu": "octofold.kernels.cpu_scaled_mm",
        "bytes": "octofold.kernels.bytes_scaled_mm",
        "reference": "octofold.kernels.reference.scaled_mm",
    },
    "scaled_grouped_inner_mm": {
        "npu": "octofold.kernels.npu.scaled_mm",
        "triton": "octofold.kernels.triton_scaled_mm",
        "cpu": "octofold.kernels.cpu_scaled_mm",
        "bytes": "octofold.kernels.bytes_scaled_mm",
        "reference": "octofold.kernels.reference.scaled_mm",
    },
}
"""op -> provider -> module, in the order `auto` tries them. A module has a function named as the op, and
`why_unsupported(workload) -> str | None`."""
FP8_OPS = [op for op in PROVIDERS if "quantize" in op or op.startswith("scaled_")]
"""Those that only FP8 runs call."""


EMULATIONS = ("cpu", "bytes", "reference")
"""Providers that decode the operands of quantised products and multiply them in FP32 or wider."""


@dataclass(frozen=True)
class Workload:
    """What the ops will be asked to do, as far as it decides between providers."""

    device_type: str
    dtype: torch.dtype
    grouped_widths: tuple[int, ...] = ()
    """Row lengths of the operands of grouped products."""
    formats: tuple[Format, ...] = ()
    """How operands are quantised; none in a run without FP8."""
    accumulation: str = "fp32"
    """Of quantised products: fp32 or hopper (`kernels/reference/scaled_mm.py`)."""
    experts: int = 0
    """That a gate chooses from; 0: there is none."""
    expert_groups: int = 1
    """Of which it keeps some before it chooses."""


@dataclass(frozen=True)
class Kernels:
    """The chosen providers, one callable for each public op (the signatures stand in kernels/reference/)."""

    attention: Callable[..., torch.Tensor]
    grouped_mm: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    gate_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    permute: Callable[..., torch.Tensor]
    unpermute: Callable[..., torch.Tensor]
    quantize: Callable[..., QTensor]
    quantize_groups: Callable[..., QTensor]
    swiglu_quantize: Callable[..., QTensor]
    dequantize: Callable[..., torch.Tensor]
    scaled_mm: Callable[..., torch.Tensor]
    scaled_grouped_mm: Callable[..., torch.Tensor]
    scaled_grouped_inner_mm: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """One row of the start-up table."""

    op: str
    provider: str
    rejected: dict[str, str]
    """Providers that came first in order and cannot serve, with the reason."""


def choose(config: KernelsConfig, workload: Workload) -> tuple[Kernels, list[Choice]]:
    """Pick a provider for every op.

    Raises:
        ConfigError: a named provider that does not exist or cannot serve the workload.
    """
    functions, choices = {}, []
    for op, providers in PROVIDERS.items():
        choice = _choose_one(op, getattr(config, op), providers, workload)
        functions[op] = _load(op, choice.provider)
        if workload.formats or op not in FP8_OPS:
            choices.append(choice)
    return Kernels(**functions), choices


def _load(op: str, provider: str, attribute: str | None = None) -> Callable[..., Any]:
    """The function that computes `op`, or another attribute of its provider's module."""
    target = provider if is_dotted(provider) else f"{PROVIDERS[op][provider]}:{op}"
    if attribute:
        target = f"{target.partition(':')[0]}:{attribute}"
    function = load_dotted(target, f"kernels.{op}")
    assert callable(function), f"{target} is no function"
    return function


def _choose_one(op: str, wanted: str, providers: dict[str, str], workload: Workload) -> Choice:
    if wanted not in ("auto", *providers) and not is_dotted(wanted):
        raise unknown_name_error(f"kernels.{op}", wanted, ["auto", *providers])
    rejected: dict[str, str] = {}
    for name in providers if wanted == "auto" else [wanted]:
        reason = _load(op, name, "why_unsupported")(workload)
        if reason is None:
            return Choice(op, name, rejected)
        rejected[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    raise ConfigError(f"kernels.{op}", wanted, f"the provider must support the run: {reasons}", f"kernels.{op}=auto")
