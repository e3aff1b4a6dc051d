"""Grouped product for CPUs: one product an expert, written in place. Knowing the group sizes costs nothing there."""

import torch

from octofold.kernels.cpu_products import matmul, matmul_into, widens
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


BLOCK_ROWS = 64


def _parts(x_rD: torch.Tensor) -> tuple[int, int]:
    """Rows multiplied as they are, and rows that are padded to one block first.

    oneDNN compiles code for every new shape of a BF16 product, which costs more than the product; experts receive
    another number of tokens at every step. Multiples of a block keep the shapes few.
    """
    rows = x_rD.shape[0]
    rest = rows % BLOCK_ROWS if x_rD.dtype == torch.bfloat16 and not widens(x_rD) else 0
    return rows - rest, rest


def _padded(x_rD: torch.Tensor) -> torch.Tensor:
    block = x_rD.new_zeros(BLOCK_ROWS, x_rD.shape[1])
    block[: x_rD.shape[0]] = x_rD
    return block


def rows_mm(x_rD: torch.Tensor, w_DF: torch.Tensor, out_rF: torch.Tensor) -> None:
    """out = x w."""
    whole, rest = _parts(x_rD)
    if whole:
        matmul_into(x_rD[:whole], w_DF, out_rF[:whole])
    if rest:
        out_rF[whole:] = matmul(_padded(x_rD[whole:]), w_DF)[:rest]


def _inner_mm(a_rF: torch.Tensor, b_rD: torch.Tensor, out_FD: torch.Tensor) -> None:
    """out = aᵀ b, summed over the rows; the padded rows add zeros."""
    whole, rest = _parts(a_rF)
    matmul_into(a_rF[:whole].t(), b_rD[:whole], out_FD)
    if rest:
        out_FD += matmul(_padded(a_rF[whole:]).t(), _padded(b_rD[whole:]))


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, counts_E):
        ctx.sizes = counts_E.tolist()
        ctx.save_for_backward(x_ND, w_EFD)
        out_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
        for x, w, out in zip(x_ND.split(ctx.sizes), w_EFD, out_NF.split(ctx.sizes), strict=True):
            rows_mm(x, w.t(), out)
        return out_NF

    @staticmethod
    def backward(ctx, grad_NF):
        x_ND, w_EFD = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x_ND), torch.empty_like(w_EFD)
        groups = (grad_NF.split(ctx.sizes), x_ND.split(ctx.sizes), w_EFD, grad_x.split(ctx.sizes), grad_w)
        for grad, x, w, into_x, into_w in zip(*groups, strict=True):
            rows_mm(grad, w, into_x)
            _inner_mm(grad, x, into_w)
        return grad_x, grad_w, None


def grouped_mm(x_ND: torch.Tensor, w_EFD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/grouped_mm.py."""
    product: torch.Tensor = _GroupedMm.apply(x_ND, w_EFD, counts_E)
    return product
