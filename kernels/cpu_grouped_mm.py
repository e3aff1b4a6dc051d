"""Grouped product for CPUs: one product an expert, written in place. Knowing the group sizes costs nothing there."""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, counts_E):
        ctx.sizes = counts_E.tolist()
        ctx.save_for_backward(x_ND, w_EFD)
        out_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
        for x, w, out in zip(x_ND.split(ctx.sizes), w_EFD, out_NF.split(ctx.sizes), strict=True):
            torch.mm(x, w.t(), out=out)
        return out_NF

    @staticmethod
    def backward(ctx, grad_NF):
        x_ND, w_EFD = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x_ND), torch.empty_like(w_EFD)
        groups = (grad_NF.split(ctx.sizes), x_ND.split(ctx.sizes), w_EFD, grad_x.split(ctx.sizes), grad_w)
        for grad, x, w, into_x, into_w in zip(*groups, strict=True):
            torch.mm(grad, w, out=into_x)
            torch.mm(grad.t(), x, out=into_w)
        return grad_x, grad_w, None


def grouped_mm(x_ND: torch.Tensor, w_EFD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/grouped_mm.py."""
    product: torch.Tensor = _GroupedMm.apply(x_ND, w_EFD, counts_E)
    return product
