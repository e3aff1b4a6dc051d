"""Rows that are copied a varying number of times and summed again, always in the same order.

S rows, C copies, K experts a row, D width.
"""

import torch


def sum_rows(rows_CD: torch.Tensor, into_C: torch.Tensor, size: int) -> torch.Tensor:
    """[size, D]: row s is the sum of the rows whose `into` is s, in their order.

    Sums are FP32 (FP64 for FP64) and rounded once to the dtype of the rows.
    """
    exact = torch.float64 if rows_CD.dtype == torch.float64 else torch.float32
    total_SD = torch.zeros(size, rows_CD.shape[1], dtype=exact, device=rows_CD.device)
    if rows_CD.device.type == "cpu":
        return total_SD.index_add_(0, into_C, rows_CD.to(exact)).to(rows_CD.dtype)
    # Accelerators add with atomics in index_add_, in any order; here they sort first.
    return total_SD.index_put_((into_C,), rows_CD.to(exact), accumulate=True).to(rows_CD.dtype)


def copy_rows(rows_SD: torch.Tensor, from_C: torch.Tensor) -> torch.Tensor:
    """[C, D]: copy c is row from[c]. Differentiable."""
    copies: torch.Tensor = _Copy.apply(rows_SD, from_C)
    return copies


def weigh_rows(y_CD: torch.Tensor, weights_SK: torch.Tensor, choice_C: torch.Tensor) -> torch.Tensor:
    """[S, D]: Σ weight · y over the copies of each row. Differentiable in y and in the weights.

    As `unpermute` (kernels/reference/permute.py), for rows that have fewer than K copies here.

    Args:
        weights_SK: FP32 (or FP64), rounded to the dtype of y for the sum.
        choice_C: s·K + k of the copy of row s for its k-th expert.
    """
    weighed: torch.Tensor = _Weigh.apply(y_CD, weights_SK, choice_C)
    return weighed


def indices_of(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the true elements of a bool tensor, flattened, in order: int64 [count].

    Args:
        count: how many are true; known beforehand, so that a device need not be asked.
    """
    return chosen.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_SD, from_C):
        ctx.save_for_backward(from_C)
        ctx.size = rows_SD.shape[0]
        return rows_SD.index_select(0, from_C)

    @staticmethod
    def backward(ctx, grad_CD):
        (from_C,) = ctx.saved_tensors
        return sum_rows(grad_CD, from_C, ctx.size), None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_CD, weights_SK, choice_C):
        ctx.save_for_backward(y_CD, weights_SK, choice_C)
        size, slots = weights_SK.shape
        return sum_rows(y_CD * _weights(y_CD, weights_SK, choice_C), choice_C // slots, size)

    @staticmethod
    def backward(ctx, grad_SD):
        y_CD, weights_SK, choice_C = ctx.saved_tensors
        grad_CD = grad_SD.index_select(0, choice_C // weights_SK.shape[1])
        grad_weights = torch.zeros_like(weights_SK).flatten()
        grad_weights[choice_C] = torch.bmm(grad_CD[:, None], y_CD[:, :, None])[:, 0, 0].to(weights_SK.dtype)
        grad_y_CD = grad_CD.mul_(_weights(y_CD, weights_SK, choice_C))
        return grad_y_CD, grad_weights.view_as(weights_SK), None


def _weights(y_CD: torch.Tensor, weights_SK: torch.Tensor, choice_C: torch.Tensor) -> torch.Tensor:
    return weights_SK.flatten().index_select(0, choice_C).to(y_CD.dtype)[:, None]
