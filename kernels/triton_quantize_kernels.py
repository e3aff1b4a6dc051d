"""Triton kernels of kernels/triton_quantize.py. Importing this file needs Triton.

A program takes TILES_R x TILES_C tiles of one matrix as a block of four dims [TILES_R, HIGH, TILES_C, WIDE]: HIGH and
WIDE are the tile's lengths filled up to powers of two, as Triton wants them, and what lies outside is masked.
Magnitudes are compared as integers, by their bits: that orders them as numbers, with infinity and then NaN last.
"""

# Only constants of compilation carry annotations, since those alone mean something to Triton.
# mypy: allow-incomplete-defs

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
ONE_BITS = tl.constexpr(0x3F800000)
NAN_BYTE = tl.constexpr(0xFF)
"""Of e8m0."""


@triton.jit
def _program_tiles(tile_rows, tile_columns, TILES_R: tl.constexpr, TILES_C: tl.constexpr):
    """This program's matrix, its rows of tiles [TILES_R] and its columns of tiles [TILES_C]; 64-bit all."""
    programs_r, programs_c = tl.cdiv(tile_rows, TILES_R), tl.cdiv(tile_columns, TILES_C)
    program = tl.program_id(0).to(tl.int64)
    matrix = program // (programs_r * programs_c)
    tile_r = program // programs_c % programs_r * TILES_R + tl.arange(0, TILES_R)
    tile_c = program % programs_c * TILES_C + tl.arange(0, TILES_C)
    return matrix, tile_r, tile_c


@triton.jit
def _places(tile, length, LENGTH: tl.constexpr):
    """Rows (or columns) [TILES, LENGTH] of tiles, and which places are not beyond a tile's end [1, LENGTH]."""
    inner = tl.arange(0, LENGTH)[None, :]
    return tile[:, None] * length + inner, inner < length


@triton.jit
def _at(x_ptr, strides, matrix, row, column):
    """Pointers to places of a matrix of a stack."""
    return x_ptr + matrix * strides[0] + row * strides[1] + column * strides[2]


@triton.jit
def _load(x_ptr, strides, matrix, row, column, inside, columns, SWIGLU: tl.constexpr):
    """FP32 [TILES_R, HIGH, TILES_C, WIDE], zero outside; with SWIGLU silu(gate) · up of two columns `columns` apart."""
    pointers = _at(x_ptr, strides, matrix, row[:, :, None, None], column[None, None, :, :])
    x = tl.load(pointers, mask=inside, other=0).to(tl.float32)
    if SWIGLU:
        up = tl.load(pointers + columns * strides[2], mask=inside, other=0).to(tl.float32)
        x = x / (1 + tl.exp(-x)) * up
    return x


@triton.jit
def _amax_bits(x):
    """Bits of the largest magnitude of each tile: int32 [TILES_R, TILES_C]."""
    return tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=3), axis=1)


@triton.jit
def amax_kernel(
    x_ptr,
    amax_ptr,
    x_strides,
    rows,
    columns,
    tile_rows,
    tile_columns,
    high,
    wide,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    TILES_R: tl.constexpr,
    TILES_C: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Write the bits of each tile's largest magnitude: int32 [E, r, c], contiguous."""
    matrix, tile_r, tile_c = _program_tiles(tile_rows, tile_columns, TILES_R, TILES_C)
    row, own_row = _places(tile_r, high, HIGH)
    column, own_column = _places(tile_c, wide, WIDE)
    inside = (own_row & (row < rows))[:, :, None, None] & (own_column & (column < columns))[None, None, :, :]
    x = _load(x_ptr, x_strides, matrix, row, column, inside, columns, SWIGLU)
    into = amax_ptr + (matrix * tile_rows + tile_r[:, None]) * tile_columns + tile_c[None, :]
    tl.store(into, _amax_bits(x), mask=(tile_r < tile_rows)[:, None] & (tile_c < tile_columns)[None, :])


@triton.jit
def _scale_bits(amax_bits, LARGEST: tl.constexpr, E8M0: tl.constexpr, LEAST_AMAX: tl.constexpr):
    """Bits of each tile's FP32 scale: amax ÷ the largest number, at least 2^-126; as a power of two 1 for zeros."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), LEAST_AMAX)
    bits = tl.math.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)).to(tl.int32, bitcast=True)
    if E8M0:
        # Up to a power of two: the exponent, plus one where anything stands behind it.
        raised = ((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)) << 23
        bits = tl.where(bits == 0, ONE_BITS, raised)
    return tl.where(amax_bits < INFINITY_BITS, tl.maximum(bits, 1 << 23), NAN_BITS)


@triton.jit
def _divide(x, scale_bits, POWERS_OF_TWO: tl.constexpr):
    """Each number of a block over the scale of its tile, rounded as IEEE 754 says."""
    if POWERS_OF_TWO:
        # The reciprocal of a normal one is one too, so that the product is the quotient.
        inverse_bits = tl.where(scale_bits < INFINITY_BITS, (254 << 23) - scale_bits, NAN_BITS)
        return x * inverse_bits.to(tl.float32, bitcast=True)[:, None, :, None]
    else:
        scale = scale_bits.to(tl.float32, bitcast=True)[:, None, :, None]
        return tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))


@triton.jit
def _eight_bits(x, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, IN_INTEGERS: tl.constexpr):
    """The code of the nearest number with MANTISSA bits of mantissa (3: E4M3, 2: E5M2), ties to even; uint8."""
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if not IN_INTEGERS:
        if MANTISSA == 3:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Half a unit less one, and one more where the kept part is odd, carries exactly when rounding goes up.
    rounded = magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number the unit is fixed, and FP32 itself rounds to it next to 2^23 units.
    UNITS_BITS: tl.constexpr = (127 + 23 + 1 - BIAS - MANTISSA) << 23
    units = tl.full(x.shape, UNITS_BITS, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + units).to(tl.int32, bitcast=True) - UNITS_BITS
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    code = tl.where(magnitude > INFINITY_BITS, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    amax_ptr,
    given_ptr,
    starts_ptr,
    ends_ptr,
    x_strides,
    data_strides,
    scale_strides,
    amax_strides,
    given_strides,
    rows,
    columns,
    tile_rows,
    tile_columns,
    high,
    wide,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    TILES_R: tl.constexpr,
    TILES_C: tl.constexpr,
    SWIGLU: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    E8M0: tl.constexpr,
    LEAST_AMAX: tl.constexpr,
    IN_INTEGERS: tl.constexpr,
):
    """Write data (uint8) and scales (FP32, or uint8 for e8m0) of [E, R, C], each by strides of x's order of dims.

    Args:
        amax_ptr: int32 bits of largest magnitudes by tile; None: found here.
        given_ptr: FP32 scales by tile, used where the tile is finite; None: from the largest magnitudes.
        starts_ptr, ends_ptr: int64 by row of tiles, rows of x where it starts and where its group ends; the result's
            rows are those of the tiles. None: tiles follow each other in x too.
        rows: of the result.
    """
    matrix, tile_r, tile_c = _program_tiles(tile_rows, tile_columns, TILES_R, TILES_C)
    row, own_row = _places(tile_r, high, HIGH)
    column, own_column = _places(tile_c, wide, WIDE)
    own_row, own_column = own_row & (row < rows), own_column & (column < columns)
    source_row, filled_row = row, own_row
    is_tile_r = tile_r < tile_rows
    if starts_ptr is not None:
        start = tl.load(starts_ptr + tile_r, mask=is_tile_r, other=0)[:, None]
        source_row = start + tl.arange(0, HIGH)[None, :]
        filled_row = own_row & (source_row < tl.load(ends_ptr + tile_r, mask=is_tile_r, other=0)[:, None])
    inside = filled_row[:, :, None, None] & own_column[None, None, :, :]
    x = _load(x_ptr, x_strides, matrix, source_row, column, inside, columns, SWIGLU)
    place_r, place_c, is_tile = tile_r[:, None], tile_c[None, :], is_tile_r[:, None] & (tile_c < tile_columns)[None, :]
    if amax_ptr is None:
        amax_bits = _amax_bits(x)
    else:
        amax_bits = tl.load(_at(amax_ptr, amax_strides, matrix, place_r, place_c), mask=is_tile, other=0)
    if given_ptr is None:
        scale_bits = _scale_bits(amax_bits, LARGEST, E8M0, LEAST_AMAX)
    else:
        given = tl.load(_at(given_ptr, given_strides, matrix, place_r, place_c), mask=is_tile, other=1)
        scale_bits = tl.where(amax_bits < INFINITY_BITS, given.to(tl.int32, bitcast=True), NAN_BITS)
    code = _eight_bits(_divide(x, scale_bits, E8M0 and given_ptr is None), LARGEST, MANTISSA, IN_INTEGERS)
    into = _at(data_ptr, data_strides, matrix, row[:, :, None, None], column[None, None, :, :])
    tl.store(into, code, mask=own_row[:, :, None, None] & own_column[None, None, :, :])
    into_scale = _at(scale_ptr, scale_strides, matrix, place_r, place_c)
    if E8M0:
        tl.store(into_scale, ((scale_bits >> 23) & NAN_BYTE).to(tl.uint8), mask=is_tile)
    else:
        tl.store(into_scale, scale_bits.to(tl.float32, bitcast=True), mask=is_tile)


@triton.jit
def group_tiles_kernel(
    counts_ptr, starts_ptr, ends_ptr, groups, tiles, unit, GROUPS: tl.constexpr, TILES: tl.constexpr
):
    """For each tile of `unit` rows: the row where it starts and the row where its group ends; equal for unused tiles.

    Args:
        counts_ptr: int64, rows of each group.
        starts_ptr, ends_ptr: int64 [tiles].
    """
    group = tl.arange(0, GROUPS)
    counts = tl.load(counts_ptr + group, mask=group < groups, other=0)
    group_tiles = (counts + unit - 1) // unit
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    earlier = (tl.cumsum(group_tiles, 0)[None, :] <= tile[:, None]) & (group < groups)[None, :]
    first_row = tl.sum(tl.where(earlier, counts[None, :], 0), axis=1)
    first_tile = tl.sum(tl.where(earlier, group_tiles[None, :], 0), axis=1)
    own_group = tl.sum(earlier.to(tl.int32), axis=1)
    count = tl.sum(tl.where(group[None, :] == own_group[:, None], counts[None, :], 0), axis=1)
    is_tile = tile < tiles
    end = first_row + count
    # Tiles behind the last group start where it ends.
    tl.store(starts_ptr + tile, tl.minimum(first_row + (tile - first_tile) * unit, end), mask=is_tile)
    tl.store(ends_ptr + tile, end, mask=is_tile)
