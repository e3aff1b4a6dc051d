"""SwiGLU that keeps only its input for the backward pass and forms the gradient in place."""

import torch
import torch.nn.functional as F

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """torch's pointwise ops run everywhere."""
    return None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up, grad)


def swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of gate_up [..., 2·I] from that of its SwiGLU [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    # One fused pass: grad · up · silu'(gate).
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As kernels/reference/swiglu.py, with BF16 rounding between the two factors."""
    activated: torch.Tensor = _SwiGLU.apply(gate_up)
    return activated
