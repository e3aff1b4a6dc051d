"""Rotary position embedding by npu_rotary_mul, with torch_npu's gradient."""

import torch

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16, FP16 and FP32."""
    return why_no_npu(workload)


def rotary(x_BSHr: torch.Tensor, cos_BSc: torch.Tensor, sin_BSc: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/rotary.py."""
    # First members before second ones, which is where the result wants them and what mode "half" turns.
    halves_BSHr = x_BSHr.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    cos, sin = (torch.cat([table, table], -1)[:, :, None].to(x_BSHr.dtype) for table in (cos_BSc, sin_BSc))
    turned: torch.Tensor = torch.ops.npu.npu_rotary_mul(halves_BSHr, cos, sin, "half")
    return turned
