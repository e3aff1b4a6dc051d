"""Quantisers with a planted fault each: providers for kernels.quantize that a verification has to catch."""

import torch

from octofold.kernels.qtensor import E5M2, Format, QTensor
from octofold.kernels.reference import quantize as reference
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """They run everywhere."""
    return None


def rounded_down(
    x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None
) -> QTensor:
    """Scales rounded down to a power of two: the largest numbers of most tiles saturate."""
    exact = reference.amax_of(x, format).clamp(min=format.least_amax) / format.largest
    down = torch.exp2(torch.floor(torch.log2(exact.clamp(min=2.0**-126))))
    return reference.quantize(x, format, transpose=transpose, scale=down)


def saturating(
    x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None
) -> QTensor:
    """Scales too small by two."""
    halved = reference.scales_of(reference.amax_of(x, format), format) / 2
    return reference.quantize(x, format, transpose=transpose, scale=halved)


def unscaled(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """A plain cast: every scale is 1, and small numbers vanish."""
    ones = torch.ones_like(reference.amax_of(x, format))
    return reference.quantize(x, format, transpose=transpose, scale=ones)


def neighbours_scale(
    x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None
) -> QTensor:
    """A gradient (told by E5M2) divided by the scale of the next row of tiles, and kept with its own."""
    quantized = reference.quantize(x, format, transpose=transpose, scale=scale)
    if format.dtype != E5M2:
        return quantized
    own = reference.scales_of(reference.amax_of(x, format), format)
    wrong = reference.quantize(x, format, transpose=transpose, scale=own.roll(1, dims=-2))
    return QTensor(wrong.data, quantized.scale, quantized.format)


def broken(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """Scales that are no numbers."""
    nothing = torch.full_like(reference.amax_of(x, format), torch.nan)
    return reference.quantize(x, format, transpose=transpose, scale=nothing)
