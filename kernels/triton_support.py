"""What the Triton providers share: whether they can serve a run. Importable without Triton; their kernels are not."""

import os
from importlib.util import find_spec

import torch

from octofold.kernels.registry import Workload

FP8_CAST_CAPABILITY = (8, 9)
"""The first GPUs that convert to E4M3 and E5M2."""


def why_no_triton(workload: Workload) -> str | None:
    """Triton must be there, and so must a GPU; or its interpreter was asked for, which computes on CPUs, for tests."""
    on_interpreter = workload.device_type == "cpu" and bool(os.environ.get("TRITON_INTERPRET"))
    if workload.device_type != "cuda" and not on_interpreter:
        return f"made for NVIDIA GPUs, the run is on {workload.device_type}"
    if workload.device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if on_interpreter and not interpreted():
        return "TRITON_INTERPRET was set to 0, or after Triton had been imported"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when Triton is imported."""
    from triton.language import max as any_function
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(any_function, InterpretedFunction)


def casts_in_integers(device: torch.device) -> bool:
    """Whether kernels round to eight bits themselves: older GPUs cannot, and the interpreter rounds E4M3 wrongly.

    Either way the results are the same.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAST_CAPABILITY
