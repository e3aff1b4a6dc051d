"""Grouped product by npu_grouped_matmul, which has no gradient of its own: both are grouped products again.

N rows, E experts, D input width, F output width. The group sizes stay on the device.
"""

import torch

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload

WIDTH_LIMIT = 65536
"""Rows of operands are shorter (the operator's documentation: InnerLimit)."""
ROWS, INNER = 0, 2
"""`group_type`: which dim the groups divide."""


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, in BF16, FP16 and FP32, rows shorter than 65536."""
    if long := [width for width in workload.grouped_widths if width >= WIDTH_LIMIT]:
        return why_no_npu(workload) or f"row lengths must be below {WIDTH_LIMIT}, got {long}"
    return why_no_npu(workload)


def product_of_groups(a: torch.Tensor, b: torch.Tensor, ends_E: torch.Tensor, group_type: int) -> torch.Tensor:
    """One tensor (`split_item` 3): ROWS: [N, D] x [E, D, F], INNER: [D, N] x [N, F] for each group."""
    # Ends of groups and not sizes: of sizes the operator wants two or more.
    options = {"group_list": ends_E, "group_list_type": 0, "group_type": group_type, "split_item": 3}
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul([a], [b], **options)[0]
    return product


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, ends_E):
        ctx.save_for_backward(x_ND, w_EFD, ends_E)
        return product_of_groups(x_ND, w_EFD.transpose(1, 2), ends_E, ROWS)

    @staticmethod
    def backward(ctx, grad_NF):
        x_ND, w_EFD, ends_E = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x = product_of_groups(grad_NF, w_EFD, ends_E, ROWS) if ctx.needs_input_grad[0] else None
        # The operator reads a transposed view as such, without a copy.
        grad_w = product_of_groups(grad_NF.t(), x_ND, ends_E, INNER) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


def grouped_mm(x_ND: torch.Tensor, w_EFD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/grouped_mm.py."""
    if x_ND.shape[0] == 0:
        # No operator call on nothing; the product keeps both operands in the graph, with zero gradients.
        return x_ND @ w_EFD.sum(0).t()
    product: torch.Tensor = _GroupedMm.apply(x_ND, w_EFD, counts_E.cumsum(0))
    return product
