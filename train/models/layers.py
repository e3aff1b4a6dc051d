"""Parts that every layer uses: norm, dense feed-forward network, rotary position embedding.

B sequences, S positions, H heads, D hidden width, I feed-forward width, r rotary width.
"""

import torch
from torch import nn

from octofold.kernels.registry import Kernels


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU network: down(silu(gate x) · up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        # One product with both weights: joining weights copies less than joining activations.
        gate_up = nn.functional.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        return self.down_proj(self.kernels.swiglu(gate_up))


def rope_tables(positions_BS: torch.Tensor, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position · theta^(−2i/r), FP32 [B, S, r/2] each (RoFormer, section 3.2.2)."""
    exponents = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float64) / width
    frequencies = theta**-exponents
    angles = positions_BS[..., None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x_BSHr: torch.Tensor, cos_BSc: torch.Tensor, sin_BSc: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x₀,x₁), (x₂,x₃), … by their angles.

    The weights of DeepSeek models store pairs interleaved. The result holds all first members, then all second ones;
    queries and keys are reordered alike, so their products do not change.

    Args:
        x_BSHr: queries or keys, r even.
        cos_BSc, sin_BSc: FP32, c = r/2.
    """
    cos, sin = cos_BSc[:, :, None].to(x_BSHr.dtype), sin_BSc[:, :, None].to(x_BSHr.dtype)
    first, second = x_BSHr[..., 0::2], x_BSHr[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
