"""RMSNorm by npu_rms_norm, with torch_npu's gradient."""

import torch

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16, FP16 and FP32."""
    return why_no_npu(workload)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As kernels/reference/rms_norm.py."""
    normed: torch.Tensor = torch.ops.npu.npu_rms_norm(x, weight, eps)[0]
    return normed
