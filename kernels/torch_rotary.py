"""Rotary position embedding by torch's pointwise ops."""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """torch's pointwise ops run everywhere."""
    return None


def rotary(x_BSHr: torch.Tensor, cos_BSc: torch.Tensor, sin_BSc: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/rotary.py, with BF16 rounding of each product."""
    cos, sin = cos_BSc[:, :, None].to(x_BSHr.dtype), sin_BSc[:, :, None].to(x_BSHr.dtype)
    first, second = x_BSHr[..., 0::2], x_BSHr[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
