"""FP8 ops with a planted fault each: providers for kernels.<op> that a verification has to catch."""

from typing import Any

import torch

from octofold.kernels.qtensor import E5M2, Format, QTensor
from octofold.kernels.reference import quantize as reference
from octofold.kernels.reference import scaled_mm as products
from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """They run everywhere."""
    return None


# For kernels.quantize.


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


def turned_neighbours_scale(
    x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None
) -> QTensor:
    """What a product over rows wants, with each tile's scale next to its own."""
    quantized = reference.quantize(x, format, transpose=transpose, scale=scale)
    return _with_neighbours_scale(quantized) if transpose else quantized


# For kernels.dequantize: what was kept for the backward pass.


def kept_with_neighbours_scale(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Each tile has the scale of one beside it."""
    return _with_neighbours_scale(x).dequantize(dtype)


def kept_halved(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Exponents too small by one."""
    return x.dequantize(dtype) / 2


def kept_as_zeros(x: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Never written."""
    return torch.zeros(x.shape, dtype=dtype)


# For kernels.swiglu_quantize.


def up_for_gate(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """The halves are mixed up."""
    return reference.swiglu_quantize(gate_up.roll(gate_up.shape[-1] // 2, dims=-1), format, scale=scale)


def unscaled_swiglu(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """A plain cast."""
    return reference.swiglu_quantize(gate_up, format, scale=torch.ones(1, 1))


# For kernels.quantize_groups.


def next_groups_rows(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """Groups begin where those of other counts would."""
    return reference.quantize_groups(x_ND, counts_E.roll(1), format, scale=scale)


def groups_neighbours_scale(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """Each tile has the scale of one beside it."""
    return _with_neighbours_scale(reference.quantize_groups(x_ND, counts_E, format, scale=scale))


def last_row_lost(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """The last row of every group becomes zeros."""
    last = counts_E.cumsum(0)[counts_E > 0] - 1
    return reference.quantize_groups(x_ND.index_fill(0, last, 0), counts_E, format, scale=scale)


# For kernels.scaled_mm, kernels.scaled_grouped_mm and kernels.scaled_grouped_inner_mm.


def larger(a: QTensor, b: QTensor, **options: Any) -> torch.Tensor:
    """A twentieth too large."""
    return products.scaled_mm(a, b, **options) * 1.05


def larger_grouped(a: QTensor, b: QTensor, counts_E: torch.Tensor, **options: Any) -> torch.Tensor:
    """A twentieth too large."""
    return products.scaled_grouped_mm(a, b, counts_E, **options) * 1.05


def next_groups_matrix(a: QTensor, b: QTensor, counts_E: torch.Tensor, **options: Any) -> torch.Tensor:
    """Rows meet the matrix of another group."""
    others = QTensor(b.data.roll(1, dims=0), b.scale.roll(1, dims=0), b.format)
    return products.scaled_grouped_mm(a, others, counts_E, **options)


def larger_inner(a: QTensor, b: QTensor, counts_E: torch.Tensor, **options: Any) -> torch.Tensor:
    """A twentieth too large."""
    return products.scaled_grouped_inner_mm(a, b, counts_E, **options) * 1.05


def next_groups_gradient(a: QTensor, b: QTensor, counts_E: torch.Tensor, **options: Any) -> torch.Tensor:
    """Each group's product is written where another's belongs."""
    return products.scaled_grouped_inner_mm(a, b, counts_E, **options).roll(1, dims=0)


def one_group_left_out(a: QTensor, b: QTensor, counts_E: torch.Tensor, **options: Any) -> torch.Tensor:
    """The product of the smallest group that has rows is never formed."""
    out = products.scaled_grouped_inner_mm(a, b, counts_E, **options)
    out[counts_E.where(counts_E > 0, counts_E.amax() + 1).argmin()] = 0
    return out


def _with_neighbours_scale(x: QTensor) -> QTensor:
    return QTensor(x.data, x.scale.roll((1, 1), dims=(-2, -1)), x.format)
