"""Quantisation to eight-bit floats with a scale for each tile: the specification.

All arithmetic is FP32: scale = amax / 448 (57344 for E5M2), data = the nearest E4M3 number (ties to even) to
element / scale. With `ue8m0` the scale is rounded up to a power of two, so that nothing saturates. A tile that holds
NaN or an infinity gets a scale of NaN and data of NaN: torch's own cast would turn an infinity into 448 and hide it.
Sources: DeepSeek-V3, section 3.3.2; the quantiser of DeepSeek-V3's published inference code; OCP MX 1.0 for the format
of its scales, with rounding up where that standard would saturate.

R rows, C columns, (a, b) tile, r x c tiles; N rows of E groups, D and I widths.
"""

import torch
import torch.nn.functional as F

from octofold.kernels.qtensor import LEAST_SCALE, Format, QTensor, spread
from octofold.kernels.registry import Workload

GROUP_UNIT = 128
"""To whose multiples a group's rows are filled up where the format's tiles have no length of their own."""


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any format."""
    return None


def quantize(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """Quantise a matrix, or each of a stack.

    Args:
        x: [..., R, C] in FP32 or BF16, any strides; R or C may be 0.
        format: its tiles are tiles of x.
        transpose: return the transposed matrix: data [..., C, R] and scales [..., c, r] with `format.transposed`. Tiles
            of (128, 1) become rows of 128 numbers, as a product over rows wants them. Contiguous here; a provider may
            return a view where its products read that as fast.
        scale: FP32 scales that broadcast to [..., r, c], from elsewhere (delayed scaling; powers of two where the
            format has such): elements beyond them saturate at ±448. Without it, scales come from x.
    """
    quantized = _with_scales(x.float(), format, amax_of(x, format), scale)
    if not transpose:
        return quantized
    turned = quantized.t()
    return QTensor(turned.data.contiguous(), turned.scale.contiguous(), turned.format)


def quantize_groups(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """The transpose of rows sorted by group, quantised along the rows such that no tile holds rows of two groups.

    Args:
        x_ND: FP32 or BF16, rows sorted by group.
        counts_E: int64, rows of each group, zero allowed; they add up to N.
        format: of the result, with tiles (1, b) or, where all share a scale, (0, 0) or (1, 0).
        scale: as in `quantize`.

    Returns:
        Data [D, T·b], with T = N // b + E: each group begins at a tile and is filled up with zeros to whole tiles; the
        groups stand one after the other, zeros follow the last. T depends on no count, so that nobody has to wait for
        them. Scales [D, T] for tiles (1, b). Where tiles have no length (b = 0), the unit b is `GROUP_UNIT`.
    """
    return quantize(_padded_groups(x_ND, counts_E, format.tile[1] or GROUP_UNIT).t(), format, scale=scale)


def swiglu_quantize(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """`quantize` of silu(gate) · up, which is FP32 and is not rounded in between.

    Args:
        gate_up: [R, 2·I] in FP32 or BF16, gate in the first half of the last dim.
        format: of the result [R, I].
        scale: as in `quantize`.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize(F.silu(gate) * up, format, scale=scale)


def amax_of(x: torch.Tensor, format: Format) -> torch.Tensor:
    """The largest magnitude of each tile: FP32 [..., r, c]; NaN or an infinity where the tile holds one."""
    rows, columns = x.shape[-2:]
    r, c = format.tiles(rows, columns)
    high, wide = format.tile[0] or max(rows, 1), format.tile[1] or max(columns, 1)
    padded = F.pad(x.float().abs(), (0, c * wide - columns, 0, r * high - rows))
    return padded.unflatten(-1, (c, wide)).unflatten(-3, (r, high)).amax((-3, -1))


def scales_of(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of tiles by their largest magnitudes, FP32; NaN where that is not finite, 1 for zeros under ue8m0."""
    scale = amax.clamp(min=format.least_amax) / format.largest
    if format.scale == "ue8m0":
        scale = round_up_to_power_of_two(scale)
    scale = scale.clamp(min=LEAST_SCALE)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below each number; FP32."""
    # scale = mantissa · 2^exponent with a mantissa in [1/2, 1); an exact power of two (1/2) stays.
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _with_scales(x: torch.Tensor, format: Format, amax: torch.Tensor, given: torch.Tensor | None) -> QTensor:
    if given is None:
        scale = scales_of(amax, format)
    else:
        scale = torch.where(torch.isfinite(amax), given.float().expand_as(amax), torch.nan)
    scaled = x / spread(scale, format.tile, x.shape)
    # NaN passes through clamp and through the cast.
    data = scaled.clamp(-format.largest, format.largest).to(format.dtype)
    return QTensor(data, scale.to(format.scale_dtype), format)


def _padded_groups(x_ND: torch.Tensor, counts_E: torch.Tensor, unit: int) -> torch.Tensor:
    """[T·b, D]: every group filled up with zeros to a multiple of `unit` rows."""
    counts = counts_E.tolist()
    groups = [F.pad(group, (0, 0, 0, -len(group) % unit)) for group in x_ND.split(counts)]
    length = (len(x_ND) // unit + len(counts)) * unit
    joined = torch.cat(groups)
    return F.pad(joined, (0, 0, 0, length - len(joined)))
