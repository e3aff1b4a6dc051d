"""A quantised matrix: eight-bit floats, a scale for each tile, and the format that says how they belong together.

R rows, C columns, (a, b) tile of a rows x b columns, r = ⌈R/a⌉ and c = ⌈C/b⌉ tiles; those at the edges may be partial.
"""

from dataclasses import dataclass, replace

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = torch.float8_e8m0fnu
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
PUBLISHED_LEAST_AMAX = 1e-4
"""What DeepSeek's quantiser takes for the largest element of a tile that has none as large. Right for weights; it would
flush gradients, which are far smaller."""
LEAST_SCALE = 2.0**-126
"""The smallest normal FP32 number: no tile is divided by less. One of zeros is by this, or by 1 under ue8m0."""


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised."""

    tile: tuple[int, int]
    """Rows and columns that share a scale; 0 is the whole extent: (1, 128) tiles of a row, (128, 128) blocks, (1, 0)
    rows, (0, 0) the matrix, (1, 32) MX."""
    scale: str = "ue8m0"
    """ue8m0: powers of two, kept in one byte; float: any FP32 number."""
    dtype: torch.dtype = E4M3
    """Of the data: E4M3 or E5M2."""
    least_amax: float = 0.0

    @property
    def transposed(self) -> "Format":
        """That of the transposed matrix."""
        return replace(self, tile=(self.tile[1], self.tile[0]))

    @property
    def largest(self) -> float:
        """The largest number of `dtype`."""
        return LARGEST[self.dtype]

    @property
    def scale_dtype(self) -> torch.dtype:
        """That scales are kept in."""
        return E8M0 if self.scale == "ue8m0" else torch.float32

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """(r, c) of a matrix: none along an empty dim, but one where a tile has its whole extent."""
        high, wide = self.tile
        return -(-rows // high) if high else 1, -(-columns // wide) if wide else 1


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix, or a stack of them: element = data · scale of its tile."""

    data: torch.Tensor
    """[..., R, C] in `format.dtype`."""
    scale: torch.Tensor
    """[..., r, c] in `format.scale_dtype`; NaN for a tile that held a number that was not finite."""
    format: Format

    @property
    def shape(self) -> torch.Size:
        """Of the data."""
        return self.data.shape

    @property
    def size_bytes(self) -> int:
        """Of data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def t(self) -> "QTensor":
        """The transposed matrix (each of a stack), as a view."""
        return QTensor(self.data.mT, self.scale.mT, self.format.transposed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[..., R, C], data times scale: exact in FP32 and FP64, rounded once otherwise.

        E4M3 and E5M2 times a power of two are exact in BF16 too, unless below its smallest number.
        """
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        scale = spread(self.scale.to(torch.float32).to(exact), self.format.tile, self.shape)
        return (self.data.to(torch.float32).to(exact) * scale).to(dtype)


def spread(scale: torch.Tensor, tile: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Each tile's scale [..., r, c] at its places: [..., R or 1, C or 1]; a dim that has one tile keeps size 1."""
    rows, columns = shape[-2:]
    if scale.shape[-2] > 1:
        scale = scale.repeat_interleave(tile[0], dim=-2)[..., :rows, :]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(tile[1], dim=-1)[..., :columns]
    return scale
