"""SwiGLU by npu_swiglu, with torch_npu's gradient."""

import torch

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16, FP16 and FP32."""
    return why_no_npu(workload)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/swiglu.py."""
    activated: torch.Tensor = torch.ops.npu.npu_swiglu(gate_up, -1)
    return activated
