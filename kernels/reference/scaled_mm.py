"""Products of quantised matrices: the specification. The operands are dequantised and multiplied in FP64.

M, N rows of the operands, K what is summed over; E groups, F output width, D input width, T·b padded rows.
"""

from collections.abc import Callable
from functools import partial

import torch

from octofold.kernels.qtensor import QTensor
from octofold.kernels.reference.quantize import GROUP_UNIT
from octofold.kernels.registry import Workload

Product = Callable[[QTensor, QTensor], torch.Tensor]
"""`scaled_mm` of two operands."""


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any format."""
    return None


def dequantize(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Data times scales, `QTensor.dequantize`: exact in FP32, and in BF16 where scales are powers of two.

    Args:
        dtype: BF16 or FP32.
    """
    return x.dequantize(dtype)


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """a bᵀ: both operands hold in their rows what is summed over.

    Args:
        a: [M, K].
        b: [N, K].
        out_dtype: BF16 or FP32.
        accumulation: fp32 stands for sums in FP32 or better; hopper for the sums of Hopper's tensor cores
            (`kernels/reference/limited_accumulator.py`), for studies of what they cost.

    Returns:
        [M, N].
    """
    if accumulation == "hopper":
        from octofold.kernels.reference.limited_accumulator import limited_mm

        return limited_mm(a, b).to(out_dtype)
    return (a.dequantize(torch.float64) @ b.dequantize(torch.float64).t()).to(out_dtype)


def scaled_grouped_mm(
    a_NK: QTensor,
    b_EFK: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """Rows of a, sorted by group, each times the transposed matrix of its group: [N, F].

    The forward product, with weights [E, F, D], and that of input gradients, with `weights.t()` [E, D, F].

    Args:
        a_NK: tiles of one row each, or one scale for all.
        b_EFK: one matrix a group.
        counts_E: int64, rows of each group, zero allowed; they add up to N.
        out_dtype, accumulation: as in `scaled_mm`.
    """
    multiply = partial(scaled_mm, out_dtype=out_dtype, accumulation=accumulation)
    return group_by_group(multiply, a_NK, b_EFK, counts_E, out_dtype)


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """For each group, a bᵀ over the group's rows alone: [E, F, D], zero for an empty group. Gradients of weights.

    Args:
        a_FT, b_DT: as `quantize_groups` makes them, [F, T·b] and [D, T·b].
        counts_E: int64, rows of each group.
        out_dtype, accumulation: as in `scaled_mm`.
    """
    multiply = partial(scaled_mm, out_dtype=out_dtype, accumulation=accumulation)
    return group_by_group_inner(multiply, a_FT, b_DT, counts_E, out_dtype)


def group_by_group(
    multiply: Product, a_NK: QTensor, b_EFK: QTensor, counts_E: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """`scaled_grouped_mm` by one product a group; waits for the counts."""
    out_NF = a_NK.scale.new_empty(a_NK.shape[0], b_EFK.shape[1], dtype=out_dtype)
    start = 0
    for group, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        out_NF[rows] = multiply(rows_of(a_NK, rows), matrix_of(b_EFK, group))
        start += count
    return out_NF


def group_by_group_inner(
    multiply: Product, a_FT: QTensor, b_DT: QTensor, counts_E: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """`scaled_grouped_inner_mm` by one product a group; waits for the counts."""
    unit = a_FT.format.tile[1] or GROUP_UNIT
    out_EFD = a_FT.scale.new_empty(len(counts_E), a_FT.shape[0], b_DT.shape[0], dtype=out_dtype)
    first = 0
    for group, count in enumerate(counts_E.tolist()):
        tiles = -(-count // unit)
        columns = (first * unit, (first + tiles) * unit)
        out_EFD[group] = multiply(columns_of(a_FT, *columns), columns_of(b_DT, *columns))
        first += tiles
    return out_EFD


def rows_of(x: QTensor, rows: slice) -> QTensor:
    """Some rows of a matrix whose tiles are one row high, or that has one scale."""
    assert x.format.tile[0] == 1 or x.scale.shape[-2] == 1
    return QTensor(
        x.data[rows], x.scale if x.scale.shape[-2] == 1 and x.format.tile[0] != 1 else x.scale[rows], x.format
    )


def columns_of(x: QTensor, first: int, end: int) -> QTensor:
    """Some columns of a matrix, cut between tiles."""
    wide = x.format.tile[1]
    scale = x.scale[:, first // wide : -(-end // wide)] if wide else x.scale
    return QTensor(x.data[:, first:end], scale, x.format)


def matrix_of(x: QTensor, index: int) -> QTensor:
    """One matrix of a stack."""
    return QTensor(x.data[index], x.scale[index], x.format)
