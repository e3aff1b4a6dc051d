"""FP8 weights in square blocks with one scale each: the specification of the published DeepSeek-V3 checkpoints.

E leading dims, R rows, C columns, b block, r = ⌈R/b⌉ and c = ⌈C/b⌉ blocks; those at the edges may be partial.
"""

import torch

from octofold.backends.errors import UserError

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
"""A block of zeros gets the scale of this."""


def quantize_blocks(
    w_ERC: torch.Tensor, *, block: int, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 data [E, R, C] and FP32 scales [E, r, c]; data · scale is the nearest to w.

    scale = max(amax, 1e-4) / 448, rounded up to a power of two where `power_of_two` (the `ue8m0` scale format); all in
    FP32, from w as it is.

    Raises:
        UserError: w holds NaN or an infinity.
    """
    w_ERC = w_ERC.float()
    amax_Erc = _blocks(w_ERC, block).abs().amax((-3, -1))
    if not torch.isfinite(amax_Erc).all():
        raise UserError(
            "a weight is not finite\n  rule:   FP8 blocks hold finite numbers\n  remedy: another checkpoint"
        )
    scale_Erc = amax_Erc.clamp(min=SMALLEST_AMAX) / E4M3_MAX
    if power_of_two:
        # scale = mantissa · 2^exponent with a mantissa in [1/2, 1); an exact power of two (1/2) stays.
        mantissa, exponent = torch.frexp(scale_Erc)
        scale_Erc = torch.ldexp(torch.ones_like(scale_Erc), exponent - (mantissa == 0.5).int())
    scaled_ERC = w_ERC / spread(scale_Erc, block, w_ERC.shape[-2:])
    return scaled_ERC.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_Erc


def dequantize_blocks(data_ERC: torch.Tensor, scale_Erc: torch.Tensor, *, block: int) -> torch.Tensor:
    """FP32 [E, R, C]: data times the scale of its block.

    Args:
        data_ERC: float8_e4m3fn.
        scale_Erc: float32 or float8_e8m0fnu. Published files call it `weight_scale_inv`; it multiplies all the same.
    """
    return data_ERC.float() * spread(scale_Erc.float(), block, data_ERC.shape[-2:])


def spread(scale_Erc: torch.Tensor, block: int, shape: torch.Size) -> torch.Tensor:
    """Every block's scale at each of its places: [E, R, C]."""
    rows, columns = shape
    by_row = scale_Erc.repeat_interleave(block, dim=-2)[..., :rows, :]
    return by_row.repeat_interleave(block, dim=-1)[..., :columns]


def _blocks(w_ERC: torch.Tensor, block: int) -> torch.Tensor:
    """[E, r, b, c, b], filled up with zeros."""
    rows, columns = w_ERC.shape[-2:]
    padded = torch.nn.functional.pad(w_ERC, (0, -columns % block, 0, -rows % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
