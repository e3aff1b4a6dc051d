"""FP8 weights as published DeepSeek-V3 checkpoints hold them: square E4M3 blocks, and scales as FP32 numbers.

The cast is that of `quantize`, with DeepSeek's least amax. E leading dims, R rows, C columns, b block, r = ⌈R/b⌉ and
c = ⌈C/b⌉ blocks; those at the edges may be partial.
"""

import torch

from octofold.backends.errors import UserError
from octofold.kernels.qtensor import E8M0, PUBLISHED_LEAST_AMAX, Format, QTensor
from octofold.kernels.reference.quantize import quantize


def quantize_blocks(
    w_ERC: torch.Tensor, *, block: int, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 data [E, R, C] and FP32 scales [E, r, c]; data · scale is the nearest to w.

    scale = max(amax, 1e-4) / 448, rounded up to a power of two where `power_of_two` (the `ue8m0` scale format); all in
    FP32, from w as it is.

    Raises:
        UserError: w holds NaN or an infinity.
    """
    scale = "ue8m0" if power_of_two else "float"
    quantized = quantize(w_ERC, Format((block, block), scale, least_amax=PUBLISHED_LEAST_AMAX))
    scale_Erc = quantized.scale.float()
    if scale_Erc.isnan().any():
        raise UserError(
            "a weight is not finite\n  rule:   FP8 blocks hold finite numbers\n  remedy: another checkpoint"
        )
    return quantized.data, scale_Erc


def dequantize_blocks(data_ERC: torch.Tensor, scale_Erc: torch.Tensor, *, block: int) -> torch.Tensor:
    """FP32 [E, R, C]: data times the scale of its block.

    Args:
        data_ERC: float8_e4m3fn.
        scale_Erc: float32 or float8_e8m0fnu. Published files call it `weight_scale_inv`; it multiplies all the same.
    """
    scale = "ue8m0" if scale_Erc.dtype == E8M0 else "float"
    return QTensor(data_ERC, scale_Erc, Format((block, block), scale)).dequantize()
