"""Rotary position embedding of interleaved pairs: the specification (Su et al. 2021).

B sequences, S positions, H heads, r rotary width, c = r/2 pairs.
"""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def rotary(x_BSHr: torch.Tensor, cos_BSc: torch.Tensor, sin_BSc: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x₀,x₁), (x₂,x₃), … by their angles; BF16 is computed in FP32 and rounded once.

    The weights of DeepSeek models store pairs interleaved. The result holds all first members, then all second ones;
    queries and keys are reordered alike, so their products do not change.

    Args:
        x_BSHr: queries or keys, r even.
        cos_BSc, sin_BSc: FP32 (or FP64), rounded to the dtype of x. No gradient.

    Returns:
        [B, S, H, r] in the dtype of x.
    """
    exact = torch.float64 if x_BSHr.dtype == torch.float64 else torch.float32
    cos, sin = (table[:, :, None].to(x_BSHr.dtype).to(exact) for table in (cos_BSc, sin_BSc))
    first, second = x_BSHr[..., 0::2].to(exact), x_BSHr[..., 1::2].to(exact)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHr.dtype)
