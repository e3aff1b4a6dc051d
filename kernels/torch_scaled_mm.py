"""Products of quantised matrices by torch's own scaled product: cuBLAS on NVIDIA GPUs, a plain loop on CPUs.

One scale a tensor or a row everywhere; DeepSeek's tiles of 128 numbers and blocks of 128 x 128 on Hopper.
"""

import torch
import torch.nn.functional as F

from octofold.kernels.qtensor import QTensor
from octofold.kernels.registry import Workload

UNIT = 16
"""To whose multiples cuBLAS wants every size."""
BLOCK = 128
SCALES_TOGETHER = 4
"""To whose multiples cuBLAS wants the scales of a row of blocks filled up."""
WHOLE = [(0, 0), (1, 0)]
BLOCKS = [(1, BLOCK), (BLOCK, BLOCK)]
FP8_CAPABILITY, HOPPER = (8, 9), (9, 0)
BLOCKS_CUDA = (12, 9)


def why_unsupported(workload: Workload) -> str | None:
    """CPUs and NVIDIA GPUs, for the formats that torch knows there."""
    if workload.device_type not in ("cpu", "cuda"):
        return f"torch has no scaled product on {workload.device_type}"
    if workload.accumulation != "fp32":
        return f"adds in FP32, not as {workload.accumulation}"
    tiles = [format.tile for format in workload.formats]
    known = WHOLE
    if workload.device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if workload.device_type == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if capability < FP8_CAPABILITY:
            return "needs a GPU that multiplies FP8 (compute capability 8.9)"
        known = WHOLE + (BLOCKS if capability == HOPPER and _cuda_version() >= BLOCKS_CUDA else [])
        if workload.dtype != torch.bfloat16 and any(tile != (0, 0) for tile in tiles):
            return "returns BF16 only, unless all of a tensor shares a scale"
    if odd := sorted({tile for tile in tiles if tile not in known}):
        return f"torch multiplies tiles {known} on this device, not {odd}"
    return None


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    by_row = (1, 0) in (a.format.tile, b.format.tile)
    a_MK, scale_a, recipe_a = _operand(a, by_row)
    b_NK, scale_b, recipe_b = _operand(b, by_row)
    if recipe_b == F.ScalingType.RowWise:
        scale_b = scale_b.t()
    out = F.scaled_mm(a_MK, b_NK.t(), scale_a, recipe_a, scale_b, recipe_b, output_dtype=out_dtype)
    return out[: a.shape[0], : b.shape[0]]


def _cuda_version() -> tuple[int, ...]:
    """That torch was built for."""
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def _operand(x: QTensor, by_row: bool) -> tuple[torch.Tensor, torch.Tensor, F.ScalingType]:
    """Data [rows, terms], contiguous and filled up with zeros; scales as torch wants them, and how it calls that.

    Args:
        by_row: the other operand or this one has scales by row, so that both must.
    """
    high, wide = x.format.tile
    rows, terms = (
        -(-size // max(unit, UNIT)) * max(unit, UNIT) for size, unit in zip(x.shape, (high, wide), strict=True)
    )
    data, scale = _filled(x.data.view(torch.uint8), rows, terms).view(x.data.dtype), x.scale.float()
    if by_row:
        return data, _filled(scale.expand(x.shape[0], 1), rows, 1), F.ScalingType.RowWise
    if not wide:
        return data, scale.reshape(()), F.ScalingType.TensorWise
    if high == 1:
        return data, _filled(scale, rows, terms // wide).t().contiguous().t(), F.ScalingType.BlockWise1x128
    together = -(-terms // wide // SCALES_TOGETHER) * SCALES_TOGETHER
    return data, _filled(scale, rows // high, together).t(), F.ScalingType.BlockWise128x128


def _filled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Contiguous, with zeros below and to the right."""
    return F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous()
