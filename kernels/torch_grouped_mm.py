"""Grouped product by torch's own grouped GEMM: one launch, no host synchronisation."""

import torch
import torch.nn.functional as F

from octofold.kernels.registry import Workload

ALIGNMENT_BYTES = 16


def why_unsupported(workload: Workload) -> str | None:
    """FP64 has no kernel, and rows must be whole multiples of 16 bytes."""
    if workload.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"torch has no grouped product in {workload.dtype}"
    if workload.device_type == "cuda" and workload.dtype != torch.bfloat16:
        return "on CUDA torch's grouped product takes BF16 only"
    multiple = ALIGNMENT_BYTES // workload.dtype.itemsize
    if odd := [width for width in workload.grouped_widths if width % multiple]:
        return f"row lengths must be multiples of {multiple}, got {odd}"
    return None


def grouped_mm(x_ND: torch.Tensor, w_EFD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/grouped_mm.py."""
    if x_ND.shape[0] == 0:
        # torch refuses an empty operand; the product keeps both operands in the graph, with zero gradients.
        return x_ND @ w_EFD.sum(0).t()
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=ends_E)
