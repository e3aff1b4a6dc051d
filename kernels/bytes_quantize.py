"""Quantisation where the device casts no FP8 (Ascend 910): as kernels/reference/quantize.py bit for bit, in FP32 and
integers, on any device. What comes out is stored and sent as FP8; nothing waits for the device.
"""

import torch
import torch.nn.functional as F

from octofold.kernels.fp8_bits import encode, encode_scale, powers_of_two
from octofold.kernels.qtensor import E8M0, Format, QTensor, spread
from octofold.kernels.reference.quantize import GROUP_UNIT, amax_of, scales_of
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any format."""
    return None


def quantize(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    amax = amax_of(x, format)
    if scale is not None:
        scale_rc = torch.where(torch.isfinite(amax), scale.float().expand_as(amax), torch.nan)
    elif format.scale_dtype == E8M0:
        scale_rc = powers_of_two(amax, format)
    else:
        scale_rc = scales_of(amax, format)
    scaled = (x.float() / spread(scale_rc, format.tile, x.shape)).clamp(-format.largest, format.largest)
    kept = encode_scale(scale_rc) if format.scale_dtype == E8M0 else scale_rc
    codes = encode(scaled, format.dtype)
    if not transpose:
        return QTensor(codes.view(format.dtype), kept, format)
    # Copied as bytes, or as FP32: such a device may copy no FP8.
    if kept.dtype == E8M0:
        kept = kept.view(torch.uint8).mT.contiguous().view(E8M0)
    else:
        kept = kept.mT.contiguous()
    return QTensor(codes.mT.contiguous().view(format.dtype), kept, format.transposed)


def quantize_groups(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """As kernels/reference/quantize.py."""
    turned = scale if scale is None or scale.ndim < 2 else scale.mT
    padded = padded_groups(x_ND, counts_E, format.tile[1] or GROUP_UNIT)
    return quantize(padded, format.transposed, transpose=True, scale=turned)


def swiglu_quantize(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize(F.silu(gate) * up, format, scale=scale)


def padded_groups(x_ND: torch.Tensor, counts_E: torch.Tensor, unit: int) -> torch.Tensor:
    """[T·b, D], T = N // b + E: each group filled up with zeros to a multiple of b = `unit` rows, found on the device.

    Args:
        x_ND: rows sorted by group.
        counts_E: int64, rows of each group.
    """
    rows, groups = len(x_ND), len(counts_E)
    padded = x_ND.new_zeros((rows // unit + groups) * unit, x_ND.shape[1])
    if not rows:
        return padded
    ends_E = counts_E.cumsum(0)
    filled_E = (counts_E + unit - 1) // unit * unit
    moved_E = (filled_E.cumsum(0) - filled_E) - (ends_E - counts_E)
    places_N = torch.arange(rows, device=x_ND.device)
    group_N = torch.searchsorted(ends_E, places_N, right=True)
    return padded.index_copy_(0, places_N + moved_E[group_N], x_ND)
