"""Root-mean-square normalisation: the specification (Zhang and Sennrich 2019)."""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last dim; BF16 is computed in FP32 and rounded once.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_exact = x.to(exact)
    inverse_rms = torch.rsqrt(x_exact.square().mean(-1, keepdim=True) + eps)
    return (x_exact * inverse_rms * weight.to(exact)).to(x.dtype)
