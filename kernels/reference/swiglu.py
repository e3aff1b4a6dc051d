"""SwiGLU activation: the specification (Shazeer 2020)."""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    Args:
        gate_up: [..., 2·I], gate in the first half of the last dim, up in the second; BF16 is computed in FP32.

    Returns:
        [..., I] in the dtype of the operand.
    """
    exact = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(exact).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
