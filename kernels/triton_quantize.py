"""Quantisation to eight-bit floats by Triton kernels: as kernels/reference/quantize.py bit for bit.

Where no scale reaches beyond a tile, x is read once and the result written once, transposed or not. A scale for a whole
matrix or a whole column needs the largest magnitude first and reads x twice; so does one for a row that no block holds.

E matrices, R rows, C columns, r x c tiles; N rows of E groups, D width, T tiles of b rows.
"""

from dataclasses import dataclass
from math import prod

import torch

from octofold.kernels.qtensor import E4M3, Format, QTensor
from octofold.kernels.reference.quantize import GROUP_UNIT
from octofold.kernels.registry import Workload
from octofold.kernels.triton_support import casts_in_integers, why_no_triton

ALONG, ACROSS = 512, 8
"""Numbers that a program takes along the dim in which x and the result are contiguous, and across."""
TURNED = 64
"""In both dims where the result is contiguous in the other dim than x."""
LARGEST_BLOCK = 8192
"""Numbers in registers of one program, save where one tile has more."""
LONGEST_ROW = 16384
"""That a program takes whole."""
GROUP_TILES_AT_ONCE = 16


def why_unsupported(workload: Workload) -> str | None:
    """NVIDIA GPUs."""
    return why_no_triton(workload)


def quantize(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    return _quantize(_Source(x), format, transpose=transpose, given=scale)


def quantize_groups(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """As kernels/reference/quantize.py, without a host synchronisation."""
    groups = _Groups.of(x_ND, counts_E, format.tile[1] or GROUP_UNIT)
    turned = scale.mT if scale is not None and scale.dim() >= 2 else scale
    return _quantize(_Source(x_ND, groups=groups), format.transposed, transpose=True, given=turned)


def swiglu_quantize(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py, up to the last bits of the exponential in FP32."""
    return _quantize(_Source(gate_up, swiglu=True), format, given=scale)


@dataclass(frozen=True)
class _Groups:
    """Where tiles of rows lie in x when no tile may hold rows of two groups; found on the device."""

    unit: int
    starts_T: torch.Tensor
    """int64: the row of x at which each tile begins."""
    ends_T: torch.Tensor
    """int64: the row of x at which its group ends."""

    @staticmethod
    def of(x_ND: torch.Tensor, counts_E: torch.Tensor, unit: int) -> "_Groups":
        from triton import cdiv, next_power_of_2

        from octofold.kernels.triton_quantize_kernels import group_tiles_kernel

        groups = len(counts_E)
        tiles = len(x_ND) // unit + groups
        starts_T, ends_T = torch.empty(2, tiles, dtype=torch.int64, device=x_ND.device)
        if tiles:
            group_tiles_kernel[(cdiv(tiles, GROUP_TILES_AT_ONCE),)](
                counts_E.contiguous(),
                starts_T,
                ends_T,
                groups,
                tiles,
                unit,
                GROUPS=next_power_of_2(groups),
                TILES=GROUP_TILES_AT_ONCE,
            )
        return _Groups(unit, starts_T, ends_T)


@dataclass(frozen=True)
class _Source:
    """What is quantised: x itself, silu · up of its halves, or its rows filled up by groups."""

    x: torch.Tensor
    swiglu: bool = False
    groups: _Groups | None = None

    @property
    def rows(self) -> int:
        """Of the result, before it is transposed."""
        return self.x.shape[-2] if self.groups is None else len(self.groups.starts_T) * self.groups.unit

    @property
    def columns(self) -> int:
        """Of the result, before it is transposed."""
        return self.x.shape[-1] // 2 if self.swiglu else self.x.shape[-1]

    @property
    def along_columns(self) -> bool:
        """Whether neighbours in a row are neighbours in memory."""
        return self.x.stride(-1) == 1 or self.x.stride(-2) != 1


@dataclass(frozen=True)
class _Blocks:
    """How programs cover [R, C]: rows and columns of tiles, their lengths, and how many of them a program takes."""

    rows: int
    columns: int
    shape: tuple[int, int]
    high: int
    wide: int
    tiles_r: int
    tiles_c: int

    @staticmethod
    def of(rows: int, columns: int, tile: tuple[int, int], goal: tuple[int, int], format: Format) -> "_Blocks":
        """Programs of about `goal` numbers; a tile length of 0 leaves it to `goal` how a whole extent is cut."""
        from triton import next_power_of_2

        high, wide = tile[0] or goal[0], tile[1] or goal[1]
        area = next_power_of_2(high) * next_power_of_2(wide)
        tiles_r, tiles_c = (max(1, g // next_power_of_2(n)) for g, n in zip(goal, (high, wide), strict=True))
        while tiles_r > 1 and tiles_r * area > LARGEST_BLOCK:
            tiles_r //= 2
        while tiles_c > 1 and tiles_r * tiles_c * area > LARGEST_BLOCK:
            tiles_c //= 2
        # An empty extent has a scale where that is the scale of the whole.
        least_r, least_c = (int(not length) for length in format.tile)
        shape = max(least_r, -(-rows // high)), max(least_c, -(-columns // wide))
        return _Blocks(rows, columns, shape, high, wide, tiles_r, tiles_c)

    def programs(self, matrices: int) -> int:
        """One for each block of each matrix."""
        return matrices * -(-self.shape[0] // self.tiles_r) * -(-self.shape[1] // self.tiles_c)

    @property
    def sizes(self) -> tuple[int, ...]:
        """rows, columns, tile_rows, tile_columns, high, wide of the kernels."""
        return (self.rows, self.columns, *self.shape, self.high, self.wide)

    @property
    def constants(self) -> dict[str, int]:
        """Those of the kernels that follow from the blocks, and the number of warps."""
        from triton import next_power_of_2

        high, wide = next_power_of_2(self.high), next_power_of_2(self.wide)
        size = high * wide * self.tiles_r * self.tiles_c
        warps = 4 if size <= ALONG * ACROSS else 8
        return {"HIGH": high, "WIDE": wide, "TILES_R": self.tiles_r, "TILES_C": self.tiles_c, "num_warps": warps}


def _quantize(
    source: _Source, format: Format, *, transpose: bool = False, given: torch.Tensor | None = None
) -> QTensor:
    """`format` has tiles of x; the result is transposed afterwards, if at all."""
    from octofold.kernels.triton_quantize_kernels import quantize_kernel

    stack = source.x.shape[:-2]
    x_ERC = source.x.reshape(prod(stack), *source.x.shape[-2:])
    tile, goal = _tile_and_goal(source, format.tile, transpose)
    high = source.groups.unit if source.groups else tile[0]
    blocks = _Blocks.of(source.rows, source.columns, (high, tile[1]), goal, format)
    amax = _whole_amax_bits(source, x_ERC, tile, goal, format)
    data = _empty(len(x_ERC), source.rows, source.columns, torch.uint8, x_ERC.device, transpose)
    r, c = format.tiles(source.rows, source.columns)
    scale = _empty(len(x_ERC), r, c, torch.uint8 if format.scale == "ue8m0" else torch.float32, x_ERC.device, transpose)
    if given is not None:
        given = given.float().expand(*stack, r, c).reshape(scale.shape).expand(-1, *blocks.shape)
    if programs := blocks.programs(len(x_ERC)):
        quantize_kernel[(programs,)](
            x_ERC,
            data,
            scale,
            amax,
            given,
            source.groups and source.groups.starts_T,
            source.groups and source.groups.ends_T,
            x_ERC.stride(),
            data.stride(),
            scale.expand(-1, *blocks.shape).stride(),
            (0, 0, 0) if amax is None else amax.expand(-1, *blocks.shape).stride(),
            (0, 0, 0) if given is None else given.stride(),
            *blocks.sizes,
            **blocks.constants,
            SWIGLU=source.swiglu,
            LARGEST=format.largest,
            MANTISSA=3 if format.dtype == E4M3 else 2,
            E8M0=format.scale == "ue8m0",
            LEAST_AMAX=format.least_amax,
            IN_INTEGERS=casts_in_integers(x_ERC.device),
        )
    data = data.view(*stack, *data.shape[-2:]).view(format.dtype)
    scale = scale.view(*stack, r, c).view(format.scale_dtype)
    quantized = QTensor(data, scale, format)
    return quantized.t() if transpose else quantized


def _tile_and_goal(source: _Source, tile: tuple[int, int], transpose: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tiles whose largest magnitude one program finds (0: none sees the whole extent), and a program's numbers."""
    along_columns = source.along_columns
    if along_columns == transpose:
        return tile, (TURNED, TURNED)
    if along_columns and tile == (1, 0) and source.columns <= LONGEST_ROW:
        tile = (1, max(source.columns, 1))
    elif not along_columns and tile == (0, 1) and source.rows <= LONGEST_ROW and source.groups is None:
        tile = (max(source.rows, 1), 1)
    return tile, ((ACROSS, ALONG) if along_columns else (ALONG, ACROSS))


def _whole_amax_bits(
    source: _Source, x_ERC: torch.Tensor, tile: tuple[int, int], goal: tuple[int, int], format: Format
) -> torch.Tensor | None:
    """Where a tile is a whole extent: bits of the largest magnitudes, int32 [E, r or 1, c or 1]."""
    from octofold.kernels.triton_quantize_kernels import amax_kernel

    if all(tile):
        return None
    blocks = _Blocks.of(x_ERC.shape[1], source.columns, tile, goal, format)
    amax = torch.empty(len(x_ERC), *blocks.shape, dtype=torch.int32, device=x_ERC.device)
    if programs := blocks.programs(len(x_ERC)):
        amax_kernel[(programs,)](x_ERC, amax, x_ERC.stride(), *blocks.sizes, **blocks.constants, SWIGLU=source.swiglu)
    return amax.amax([dim - 2 for dim in (0, 1) if not tile[dim]], keepdim=True)


def _empty(
    matrices: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, transposed: bool
) -> torch.Tensor:
    """[E, R, C], contiguous, or the transpose of a contiguous [E, C, R]."""
    if transposed:
        return torch.empty(matrices, columns, rows, dtype=dtype, device=device).mT
    return torch.empty(matrices, rows, columns, dtype=dtype, device=device)
