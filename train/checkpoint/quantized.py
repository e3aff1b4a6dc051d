"""FP8 weights in a checkpoint: which scale belongs to which number of a stacked tensor.

A tensor X in E4M3 comes with X_scale_inv, one factor a block of every matrix. Gate and up projections were quantised
apart before they were stacked [E, 2I, D], so the blocks of the up half begin at its own first row.
"""

import torch

SCALE_SUFFIX = "_scale_inv"


def halves(name: str) -> int:
    """How many matrices, one below the other, a tensor's rows are."""
    return 2 if name.endswith("gate_up_proj") else 1


def scale_shape(name: str, shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Of X_scale_inv for a tensor X of this name and shape."""
    *leading, rows, columns = shape
    parts = halves(name)
    return (*leading, parts * _blocks(rows // parts, block), _blocks(columns, block))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def dequantize_window(
    name: str,
    data: torch.Tensor,
    scale: torch.Tensor,
    *,
    block: int,
    rows: int,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """FP32 values of a part of a quantised tensor: data times the scale of its block.

    Args:
        data: E4M3 [..., r, c], rows and columns of a matrix from (first_row, first_column) on.
        scale: all scales of the same matrices, [..., R, C], FP32 or E8M0.
        rows: of the whole matrix.
    """
    half = rows // halves(name)
    row_r = torch.arange(first_row, first_row + data.shape[-2])
    column_c = torch.arange(first_column, first_column + data.shape[-1])
    block_r = row_r // half * _blocks(half, block) + row_r % half // block
    factors = scale.float().index_select(-2, block_r).index_select(-1, column_c // block)
    return data.float() * factors
