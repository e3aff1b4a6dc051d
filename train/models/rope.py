"""Rotary position embedding, with YaRN for contexts longer than those first trained on.

B sequences, S positions, r rotary width, c = r/2 pairs.
"""

import math

import torch

from octofold.train.models.config import ModelConfig


def growth(factor: float, mscale: float) -> float:
    """By how much the entropy of attention asks queries and keys to grow on a context `factor` times longer."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the attention scores: d^(−1/2), under YaRN times growth(factor, mscale_all_dim)²."""
    scale, scaling = config.qk_head_dim**-0.5, config.rope_scaling
    if scaling.type == "default" or not scaling.mscale_all_dim:
        return scale
    return scale * growth(scaling.factor, scaling.mscale_all_dim) ** 2


def frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """Radians a position of each pair, FP64 [c], and the factor of the rotated parts of queries and keys.

    Pair i turns by θ^(−2i/r) (RoFormer, section 3.2.2). Under YaRN (arXiv 2309.00071, section 3.2) pairs that turn
    fewer than `beta_slow` times over the original context turn `factor` times slower, those that turn more than
    `beta_fast` times do not, and between them the share falls linearly.
    """
    width, theta, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain_c = theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    if scaling.type == "default":
        return plain_c, 1.0

    def pair_that_turns(times: float) -> float:
        turns = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    pairs_c = torch.arange(width // 2, device=device, dtype=torch.float64)
    # Where both bounds fall on one pair the ramp becomes a step.
    slowed_c = ((pairs_c - first) / ((last - first) or 0.001)).clamp(0, 1)
    stretched_c = plain_c / scaling.factor * slowed_c + plain_c * (1 - slowed_c)
    if scaling.mscale and scaling.mscale_all_dim:
        # What mscale_all_dim gives to all dimensions stands in `softmax_scale`.
        grown = growth(scaling.factor, scaling.mscale) / growth(scaling.factor, scaling.mscale_all_dim)
    else:
        grown = growth(scaling.factor, 1.0)
    return stretched_c, grown


def rope_tables(
    positions_BS: torch.Tensor, config: ModelConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position · frequency, [B, S, c] each: FP64 for a `dtype` of FP64, else FP32."""
    frequencies_c, grown = frequencies(config, positions_BS.device)
    angles = positions_BS[..., None] * frequencies_c
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (angles.cos() * grown).to(exact), (angles.sin() * grown).to(exact)
