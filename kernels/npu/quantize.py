"""Quantisation by npu_dynamic_mx_quant (Ascend 950): tiles along a row, powers of two as scales, rounded up.

`scale_alg` 1 is the reference's scale (the largest magnitude over the largest number, rounded up to a power of two)
and `block_size` any multiple of 32, so that tiles of 1 x 128 are made, too. npu_dynamic_block_quant does not fit: the
wheel documents it for INT8 on A2 and A3 alone.
What it has no tiles for is quantised by kernels/bytes_quantize.py: blocks of weights (once a step), scales from
elsewhere or with a least magnitude (old CANN ignores `max_low_bound`), FP32 in tiles of other lengths than 32.

R rows, C columns, r x c tiles; N rows of E groups, D and I widths.
"""

import torch
import torch.nn.functional as F

from octofold.backends.ascend_soc import chip_of
from octofold.kernels import bytes_quantize
from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.qtensor import E4M3, E8M0, Format, QTensor
from octofold.kernels.registry import Workload

UNIT, LONGEST_TILE = 32, 1024
ROUNDED_UP = 1
"""`scale_alg`."""
CODES = {E4M3: 24, torch.float8_e5m2: 23}
"""Of torch's dtypes, as the operators want them."""


def why_unsupported(workload: Workload) -> str | None:
    """Ascend 950, scales that are powers of two, tiles of a multiple of 32 numbers along the sum."""
    if reason := why_no_npu(workload):
        return reason
    if not hasattr(torch, "npu"):
        return "torch_npu, which knows the chip, is not imported"
    if reason := why_no_fp8(torch.npu.get_device_name()):
        return reason
    for format in workload.formats:
        if format.scale != "ue8m0":
            return "npu_dynamic_mx_quant makes scales that are powers of two (precision.scale_fmt=ue8m0)"
        long = format.tile[1]
        if not _is_tile(long):
            return f"npu_dynamic_mx_quant has tiles of a multiple of {UNIT} numbers up to {LONGEST_TILE}, not {long}"
    return None


def why_no_fp8(soc_name: str) -> str | None:
    """Why a chip cannot be asked for FP8."""
    chip = chip_of(soc_name)
    return None if chip.has_fp8 else f"{chip.name} has no FP8"


def quantize(x: torch.Tensor, format: Format, *, transpose: bool = False, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py; the scale of a tile of zeros is left to the operator."""
    along = format.transposed if transpose else format
    rows = x.mT if transpose else x
    if scale is not None or not _fits(rows, along):
        return bytes_quantize.quantize(x, format, transpose=transpose, scale=scale)
    data, pairs = torch.ops.npu.npu_dynamic_mx_quant(
        rows.contiguous(), dst_type=CODES[along.dtype], block_size=along.tile[1], scale_alg=ROUNDED_UP
    )
    # Scales come in pairs: the last may be of no tile.
    tiles = along.tiles(*rows.shape[-2:])[1]
    return QTensor(data, pairs.flatten(-2)[..., :tiles].view(E8M0), along)


def quantize_groups(
    x_ND: torch.Tensor, counts_E: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None
) -> QTensor:
    """As kernels/reference/quantize.py, without waiting for the counts."""
    turned = scale if scale is None or scale.ndim < 2 else scale.mT
    padded = bytes_quantize.padded_groups(x_ND, counts_E, format.tile[1])
    return quantize(padded, format.transposed, transpose=True, scale=turned)


def swiglu_quantize(gate_up: torch.Tensor, format: Format, *, scale: torch.Tensor | None = None) -> QTensor:
    """As kernels/reference/quantize.py."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize(F.silu(gate) * up, format, scale=scale)


def _fits(rows: torch.Tensor, format: Format) -> bool:
    """Whether the operator takes these rows: FP32 only in tiles of 32, at least one of them."""
    high, long = format.tile
    served = high == 1 and _is_tile(long) and format.scale == "ue8m0" and not format.least_amax
    return served and rows.numel() > 0 and (rows.dtype != torch.float32 or (long == UNIT <= rows.shape[-1]))


def _is_tile(length: int) -> bool:
    return length % UNIT == 0 and 0 < length <= LONGEST_TILE
