"""Parts that every layer uses: norm, dense feed-forward network, residual. D hidden width."""

from collections.abc import Callable

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


class SumResidual:
    """The plain residual: the stream is [B, S, D], and a branch's output is added to it.

    The seam for other kinds (several streams, mixed before and after each branch): a kind says how the stream begins,
    how a branch reads and writes it, and how it ends.
    """

    def begin(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The stream from the embeddings."""
        return x_BSD

    def join(self, stream: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The stream after a branch, which maps [B, S, D] to [B, S, D]."""
        return stream + branch(stream)

    def end(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, D] for the final norm."""
        return stream
