"""What torch_npu's own operators (`torch.ops.npu`) compute, in plain PyTorch: their kernels on the software NPU.

They stand below torch_npu's autograd formulas, which stay in force and call the `_backward` operators here. Written
from the operators' documentation in the wheel; an operator or an argument that is not here fails. To add one, write
its kernel on CPU tensors in a file of its family and name it in that file's KERNELS.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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
    """Register them; they stay as long as what is returned lives."""
    library = torch.library.Library("npu", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, _on_npu(kernel), "PrivateUse1", allow_override=True)
    return library


def _on_npu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel on NPU tensors: it sees their memory as CPU tensors, and its results are copied."""

    def call(*args: Any, **kwargs: Any) -> Any:
        devices = []

        def seen(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.device.type == "npu"):
                return value
            devices.append(value.device)
            return torch.ops.octofold_software_npu.cpu_view(value)

        given, named = tree_map(seen, (args, kwargs))
        with torch.no_grad():
            results = kernel(*given, **named)
        return tree_map(lambda value: value.to(devices[0]) if isinstance(value, Tensor) else value, results)

    return call
