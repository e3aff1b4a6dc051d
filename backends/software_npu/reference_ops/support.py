"""What the reference kernels share: gradients by autograd, and the error of an argument that none knows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octofold.backends.errors import UserError

Kernels = dict[str, Callable[..., Any]]
"""Operator -> its kernel, on CPU tensors."""


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Those of `function(*inputs)` for each input, given that of the result."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, dy))


def unknown(op: str, shown: str) -> UserError:
    """The error of an operator called with arguments, `shown`, for which there is no kernel."""
    rule = f"the software NPU computes {op} for the arguments that backends/software_npu/reference_ops knows"
    return UserError(f"{op} {shown}\n  rule:   {rule}\n  remedy: add them there")
