"""Two warm processes for Triton kernels: one runs them on Triton's interpreter, one compiles them for absent GPUs.

Triton decides when it is imported which of both it does, so neither may happen in the tests' own process.
"""

import os
import tempfile
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from octofold.backends.dotted import load_dotted
from octofold.kernels.qtensor import QTensor
from octofold.parallel.local_ranks import LocalRanks

SM_90, SM_80 = 90, 80
"""Hopper, which casts to eight bits itself, and Ampere, which cannot."""


def interpreted(target: str, *args: Any, **options: Any) -> Any:
    """What the function `target` (package.module:function) returns where kernels run on the interpreter."""
    found = _process("1").run(_called, target, args, options)[0]
    if not isinstance(found, QTensor):
        return found
    return QTensor(found.data.view(found.format.dtype), found.scale.view(found.format.scale_dtype), found.format)


def differentiated(target: str, *args: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As `interpreted`; behind the result the gradients of those arguments that want one."""
    found: tuple[torch.Tensor, ...] = _process("1").run(_differentiated, target, args, cotangent)[0]
    return found


def compiled(capability: int, target: str, *args: Any, **options: Any) -> dict[str, str]:
    """PTX of the kernels that `target` launches for these arguments, by name. Each has been assembled too.

    Tensors may be on the meta device: whatever reads a number of theirs fails.
    """
    found: dict[str, str] = _process("0").run(_compiled, capability, target, args, options)[0]
    return found


@cache
def _process(interpret: str) -> LocalRanks:
    """Ends with the tests: its process is a daemon."""
    pytest.importorskip("triton")
    process = LocalRanks(1)
    with mock.patch.dict(os.environ, TRITON_INTERPRET=interpret):
        process.run(_poisoned)
    return process


def _poisoned() -> None:
    """Memory that torch.empty hands out holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)


def _called(target: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    found = load_dotted(target, "test")(*args, **options)  # type: ignore[operator]
    if not isinstance(found, QTensor):
        return found
    # Tensors of eight-bit floats cannot be pickled.
    scale = found.scale if found.scale.dtype == torch.float32 else found.scale.view(torch.uint8)
    return QTensor(found.data.view(torch.uint8), scale, found.format)


def _differentiated(target: str, args: tuple[Any, ...], cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = _called(target, args, {})
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, cotangent)


def _compiled(capability: int, target: str, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, str]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found = {}

    def compile_only(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            done = kernel.run(*args, grid=grid, warmup=True, **options)
            assert done.asm["cubin"]
            found[kernel.__name__] = done.asm["ptx"]

        return launch

    absent = mock.Mock()
    absent.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    # A device number of its own for each capability: kernels are cached by device.
    absent.get_current_device.return_value = capability
    driver.set_active(absent)
    casts = mock.patch("octofold.kernels.triton_quantize.casts_in_integers", return_value=capability < 89)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch.object(JITFunction, "__getitem__", compile_only),
        casts,
    ):
        out = _called(target, args, options)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.backward(torch.empty_like(out))
    return found
