"""FP8 weights in a checkpoint: which scale belongs to which number of a tensor.

A tensor X in E4M3 comes with X_scale_inv, one factor a block of every matrix of a stack.
"""

import torch

SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Of X_scale_inv for a tensor X of this shape."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block), -(-columns // block))


def dequantize_window(
    data: torch.Tensor, scale: torch.Tensor, *, block: int, first_row: int = 0, first_column: int = 0
) -> torch.Tensor:
    """FP32 values of a part of a quantised tensor: data times the scale of its block.

    Args:
        data: E4M3 [..., r, c], rows and columns of a matrix from (first_row, first_column) on.
        scale: all scales of the same matrices, [..., R, C], FP32 or E8M0.
    """
    row_r = torch.arange(first_row, first_row + data.shape[-2])
    column_c = torch.arange(first_column, first_column + data.shape[-1])
    factors = scale.float().index_select(-2, row_r // block).index_select(-1, column_c // block)
    return data.float() * factors
