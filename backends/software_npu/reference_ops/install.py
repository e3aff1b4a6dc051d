"""What torch_npu's own operators (`torch.ops.npu`) compute, in plain PyTorch: their kernels on the software NPU.

They stand below torch_npu's autograd formulas, which stay in force and call the `_backward` operators here. Written
from the operators' documentation in the wheel; an operator or an argument that is not here fails. To add one, write
its kernel on CPU tensors in a file of its family and name it in that file's KERNELS.
"""

from collections.abc import Callable
from typing import Any

import torch

from octofold.backends.software_npu.reference_ops import attention, elementwise, gating, matmul, quantized, routing
from octofold.backends.software_npu.reference_ops.support import Kernels

KERNELS: Kernels = {
    **attention.KERNELS,
    **elementwise.KERNELS,
    **gating.KERNELS,
    **matmul.KERNELS,
    **quantized.KERNELS,
    **routing.KERNELS,
}


def install() -> torch.library.Library:
    """Register them for CPU tensors; they stay as long as what is returned lives.

    Put under tensors of the software NPU with those of PyTorch's operators (operators/install.cpp).
    """
    library = torch.library.Library("npu", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, _without_gradients(kernel), "CPU")
    return library


def _without_gradients(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """They stand below autograd, whatever called them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return kernel(*args, **kwargs)

    return call
