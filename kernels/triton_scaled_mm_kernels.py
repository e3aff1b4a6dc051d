"""Triton kernels of kernels/triton_scaled_mm.py. Importing this file needs Triton.

A program computes one block of a result. It takes what is summed over in steps that lie within one tile of either
operand, 128 terms where tiles allow, multiplies each step on the tensor cores and adds it in FP32 registers: Hopper's
own FP8 accumulators keep too few bits for more (DeepSeek-V3, section 3.3.2). Blocks of other sizes add in the same
order, so that the outcome of tuning changes no bit.

Offsets are 64-bit wherever they count rows.
"""

from typing import Any

import triton
import triton.language as tl

NAN_BITS = tl.constexpr(0x7FC00000)
NEIGHBOURS = tl.constexpr(8)
"""Rows of blocks that are computed side by side, so that they find their operands in the L2 cache."""
CONFIGS = [
    triton.Config({"BLOCK_M": high, "BLOCK_N": wide, "TMA": tma}, num_warps=warps, num_stages=stages)
    for tma in (True, False)
    for high, wide, warps, stages in (
        (128, 256, 8, 3),
        (128, 128, 8, 4),
        (128, 128, 4, 4),
        (64, 256, 4, 4),
        (64, 128, 4, 4),
    )
]
TUNED_FOR = ["size_class", "columns", "terms", "STEPS", "ALIGNED"]


@triton.jit
def _fp32(scale):
    """FP32 scales as they are; of e8m0 bytes their powers of two (0 is 2^-127, 255 NaN)."""
    if scale.dtype == tl.uint8:
        byte = scale.to(tl.int32)
        bits = tl.where(byte == 0, 1 << 22, byte << 23)
        return tl.where(byte == 255, NAN_BITS, bits).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def _scale_rows(first, row, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Which row of scales belongs to each row: [BLOCK], or [1] where it is the same one. 0 rows high: one for all."""
    if HIGH == 0:
        return tl.zeros([1], tl.int64)
    elif HIGH % BLOCK == 0:
        return first // HIGH + tl.zeros([1], tl.int64)
    else:
        return row // HIGH


@triton.jit
def _descriptor(x, last, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """For TMA, the copy engine of newer GPUs: blocks of a matrix that has rows up to `last` and columns before `end`.

    Its rows are contiguous and aligned to 16 bytes. What lies beyond the matrix is zero.
    """
    # Casts, since Triton takes a size of one for a plain number.
    shape = [tl.cast(last + 1, tl.int32), tl.cast(end, tl.int32)]
    return tl.make_tensor_descriptor(x[0], shape, [tl.cast(x[2][0], tl.int64), 1], [ROWS, COLUMNS])


@triton.jit
def _product(a, a_first, a_last, b, b_first, b_last, start, terms, TILES: tl.constexpr, STEPS: tl.constexpr, blocks):
    """a bᵀ for BLOCK_M rows of a from `a_first` and BLOCK_N of b from `b_first`, over `terms` columns from `start`.

    An operand is (data, scales, strides of data, strides of scales). Rows beyond the last, `a_last` and `b_last`, give
    any numbers. STEPS: terms of a step, these filled up to what tensor cores take, and whether loads have to be masked.
    FP32 [BLOCK_M, BLOCK_N]; zero without terms.
    """
    A_HIGH: tl.constexpr = TILES[0]
    A_WIDE: tl.constexpr = TILES[1]
    B_HIGH: tl.constexpr = TILES[2]
    B_WIDE: tl.constexpr = TILES[3]
    STEP: tl.constexpr = STEPS[0]
    BLOCK_K: tl.constexpr = STEPS[1]
    MASKED: tl.constexpr = STEPS[2]
    BLOCK_M: tl.constexpr = blocks[0]
    BLOCK_N: tl.constexpr = blocks[1]
    TMA: tl.constexpr = blocks[2]
    a_row = tl.minimum(a_first + tl.arange(0, BLOCK_M), a_last).to(tl.int64)
    b_row = tl.minimum(b_first + tl.arange(0, BLOCK_N), b_last).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    if TMA:
        a_rows = _descriptor(a, a_last, start + terms, BLOCK_M, BLOCK_K)
        b_rows = _descriptor(b, b_last, start + terms, BLOCK_N, BLOCK_K)
    else:
        column = tl.cast(start, tl.int64) + inner
        a_ptrs = a[0] + a_row[:, None] * a[2][0] + column[None, :] * a[2][1]
        b_ptrs = b[0] + b_row[None, :] * b[2][0] + column[:, None] * b[2][1]
    a_scale_ptrs = a[1] + _scale_rows(a_first, a_row, A_HIGH, BLOCK_M) * a[3][0]
    b_scale_ptrs = b[1] + _scale_rows(b_first, b_row, B_HIGH, BLOCK_N) * b[3][0]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, terms, STEP):
        offset = tl.cast(done, tl.int64)
        if TMA:
            at = tl.cast(start + done, tl.int32)
            x = a_rows.load([tl.cast(a_first, tl.int32), at])
            y = b_rows.load([tl.cast(b_first, tl.int32), at]).T
        elif MASKED:
            # Two comparisons, for the compiler sees of each how it is aligned.
            inside = (inner < terms - done) & (inner < STEP)
            x = tl.load(a_ptrs + offset * a[2][1], mask=inside[None, :], other=0.0)
            y = tl.load(b_ptrs + offset * b[2][1], mask=inside[:, None], other=0.0)
        else:
            x = tl.load(a_ptrs + offset * a[2][1])
            y = tl.load(b_ptrs + offset * b[2][1])
        part = tl.dot(x, y)
        # One after the other: the product of two small scales may be no normal number.
        if A_WIDE:
            part *= _fp32(tl.load(a_scale_ptrs + (start + done) // A_WIDE * a[3][1]))[:, None]
        if B_WIDE:
            part *= _fp32(tl.load(b_scale_ptrs + (start + done) // B_WIDE * b[3][1]))[None, :]
        total += part
    if terms > 0:
        if not A_WIDE:
            total *= _fp32(tl.load(a_scale_ptrs))[:, None]
        if not B_WIDE:
            total *= _fp32(tl.load(b_scale_ptrs))[None, :]
    return total


@triton.jit
def _store(out_ptr, total, first_row, end_row, first_column, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Into a contiguous matrix of `columns` columns, except what lies beyond its ends."""
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    into = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < end_row)[:, None] & (column < columns)[None, :]
    tl.store(into, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block_of(program, blocks_m, blocks_n):
    """Row and column of a program's block: down `NEIGHBOURS` rows, then to the next column."""
    area = NEIGHBOURS * blocks_n
    first = program // area * NEIGHBOURS
    high = tl.minimum(blocks_m - first, NEIGHBOURS)
    return first + program % area % high, program % area // high


@triton.jit
def _counts(counts_ptr, groups, GROUPS: tl.constexpr):
    """Groups [GROUPS], filled up to a power of two, and the rows of each; none of those that are no groups."""
    group = tl.arange(0, GROUPS)
    return group, tl.load(counts_ptr + group, mask=group < groups, other=0)


@triton.jit
def scaled_mm_kernel(
    a,
    b,
    out_ptr,
    rows,
    columns,
    terms,
    size_class,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """a bᵀ: [rows, columns], contiguous."""
    block_m, block_n = _block_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    first_row, first_column = block_m * BLOCK_M, block_n * BLOCK_N
    total = _product(
        a, first_row, rows - 1, b, first_column, columns - 1, 0, terms, TILES, STEPS, (BLOCK_M, BLOCK_N, TMA)
    )
    _store(out_ptr, total, first_row, rows, first_column, columns, BLOCK_M, BLOCK_N)


@triton.jit
def scaled_grouped_mm_kernel(
    a,
    b,
    counts_ptr,
    out_ptr,
    rows,
    columns,
    terms,
    groups,
    size_class,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows of each group times its matrix: [rows, columns], contiguous. The strides of b begin with that of matrices.

    Wants rows // BLOCK_M + groups rows of blocks: as many as there are however the rows are distributed.
    """
    block, block_n = _block_of(tl.program_id(0), rows // BLOCK_M + groups, tl.cdiv(columns, BLOCK_N))
    group_E, counts_E = _counts(counts_ptr, groups, GROUPS)
    blocks_E = tl.cdiv(counts_E, BLOCK_M)
    if block >= tl.sum(blocks_E):
        return
    group = tl.sum((tl.cumsum(blocks_E) <= block).to(tl.int32))
    earlier = group_E < group
    group_start = tl.sum(tl.where(earlier, counts_E, 0))
    group_end = group_start + tl.sum(tl.where(group_E == group, counts_E, 0))
    first_row = group_start + (block - tl.sum(tl.where(earlier, blocks_E, 0))) * BLOCK_M
    first_column = block_n * BLOCK_N
    matrix = group.to(tl.int64)
    own = (b[0] + matrix * b[2][0], b[1] + matrix * b[3][0], (b[2][1], b[2][2]), (b[3][1], b[3][2]))
    total = _product(
        a, first_row, group_end - 1, own, first_column, columns - 1, 0, terms, TILES, STEPS, (BLOCK_M, BLOCK_N, TMA)
    )
    _store(out_ptr, total, first_row, group_end, first_column, columns, BLOCK_M, BLOCK_N)


@triton.jit
def scaled_grouped_inner_mm_kernel(
    a,
    b,
    counts_ptr,
    out_ptr,
    rows,
    columns,
    terms,
    groups,
    size_class,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """a bᵀ over each group's columns, which begin at a multiple of UNIT: [groups, rows, columns], contiguous."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (blocks_m * blocks_n)
    block_m, block_n = _block_of(tl.program_id(0) % (blocks_m * blocks_n), blocks_m, blocks_n)
    group_E, counts_E = _counts(counts_ptr, groups, GROUPS)
    start = tl.sum(tl.where(group_E < group, tl.cdiv(counts_E, UNIT), 0)) * UNIT
    count = tl.sum(tl.where(group_E == group, counts_E, 0))
    # With 64 bits the compiler would not overlap copies and products.
    own_terms = (tl.cdiv(count, STEPS[0]) * STEPS[0]).to(tl.int32)
    first_row, first_column = block_m * BLOCK_M, block_n * BLOCK_N
    total = _product(
        a, first_row, rows - 1, b, first_column, columns - 1, start, own_terms, TILES, STEPS, (BLOCK_M, BLOCK_N, TMA)
    )
    out_ptr += group.to(tl.int64) * rows * columns
    _store(out_ptr, total, first_row, rows, first_column, columns, BLOCK_M, BLOCK_N)


def possible(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Those that suit the operands: with TMA if they are aligned, and without."""
    return [config for config in configs if constants["ALIGNED"] or not config.kwargs["TMA"]]


TUNED = {
    op: triton.autotune(CONFIGS, key=TUNED_FOR, prune_configs_by={"early_config_prune": possible})(kernel)
    for op, kernel in (
        ("scaled_mm", scaled_mm_kernel),
        ("scaled_grouped_mm", scaled_grouped_mm_kernel),
        ("scaled_grouped_inner_mm", scaled_grouped_inner_mm_kernel),
    )
}
"""Kernels with the fastest of their configurations, measured once for each of `TUNED_FOR`."""
