"""Quantisation on CPUs: as kernels/reference/quantize.py bit for bit, in few vectorised passes over BF16.

A number times a power of two is exact in BF16, so that nothing is widened where scales are such. Transposed results are
views: the products of kernels/cpu_scaled_mm.py read those as well.
"""

import torch
import torch.nn.functional as F

from octofold.kernels.fp8_bits import encode_scale, powers_of_two
from octofold.kernels.qtensor import E8M0, Format, QTensor
from octofold.kernels.reference.quantize import GROUP_UNIT, scales_of
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


def quantize(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    rows, columns = x.shape[-2:]
    r, c = format.tiles(rows, columns)
    high, wide = format.tile[0] or max(rows, 1), format.tile[1] or max(columns, 1)
    fill = (0, c * wide - columns, 0, r * high - rows)
    padded = F.pad(x, fill) if any(fill) else x.contiguous()
    tiles = padded.unflatten(-1, (c, wide)).unflatten(-3, (r, high))
    amax = _amax(tiles)
    if scale is not None:
        scale_rc = torch.where(torch.isfinite(amax), scale.expand_as(amax), torch.nan)
    elif format.scale_dtype == E8M0:
        scale_rc = powers_of_two(amax, format)
    else:
        scale_rc = scales_of(amax, format)
    data = _divided(tiles, scale_rc[..., :, None, :, None], format, saturate=scale is not None)
    data = data.to(format.dtype).flatten(-2).flatten(-3, -2)
    if any(fill):
        data = data[..., :rows, :columns]
    kept = encode_scale(scale_rc) if format.scale_dtype == E8M0 else scale_rc
    quantized = QTensor(data, kept, format)
    return quantized.t() if transpose else quantized


def quantize_groups(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """As kernels/reference/quantize.py."""
    unit = format.tile[1] or GROUP_UNIT
    counts = counts_E.tolist()
    padded = x_ND.new_zeros((len(x_ND) // unit + len(counts)) * unit, x_ND.shape[1])
    start = 0
    for group in x_ND.split(counts):
        padded[start : start + len(group)] = group
        start += -(-len(group) // unit) * unit
    turned = scale if scale is None or scale.ndim < 2 else scale.mT
    return quantize(padded, format.transposed, transpose=True, scale=turned)


def swiglu_quantize(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    gate, up = gate_up.chunk(2, dim=-1)
    return quantize(F.silu(gate.float()).mul_(up.float()), format, scale=scale)


def _amax(tiles: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes of [..., r, a, c, b]: FP32 [..., r, c]. Magnitudes are ordered as their bits are, NaN last."""
    if tiles.dtype == torch.bfloat16:
        bits = tiles.view(torch.int16) & 0x7FFF
    elif tiles.dtype == torch.float32:
        bits = tiles.view(torch.int32) & 0x7FFFFFFF
    else:
        raise AssertionError(f"{tiles.dtype} is not quantised")
    bits = bits.amax(-1) if bits.shape[-1] > 1 else bits.squeeze(-1)
    bits = bits.amax(-2) if bits.shape[-2] > 1 else bits.squeeze(-2)
    return bits.view(tiles.dtype).float()


def _divided(tiles: torch.Tensor, scale: torch.Tensor, format: Format, *, saturate: bool) -> torch.Tensor:
    """tiles / scale, within ±448."""
    if format.scale_dtype == E8M0:
        # The reciprocal is a power of two as well, at most 2^126.
        scaled = tiles * (1 / scale).to(tiles.dtype)
        return scaled.clamp_(-format.largest, format.largest) if saturate else scaled
    return (tiles.float() / scale).clamp_(-format.largest, format.largest)
