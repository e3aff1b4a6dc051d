"""Products of matrices on CPUs, in FP32 where the CPU has no instructions for BF16.

There the library multiplies BF16 numbers one by one, a hundred times slower than FP32. A product of two of them is
exact in FP32, and sums are FP32 either way: only the order of a sum changes. The result is rounded to BF16 once.
"""

import torch
import torch.nn.functional as F

from octofold.backends.cpu import multiplies_bf16


def widens(x: torch.Tensor) -> bool:
    """Whether products of such tensors are computed in FP32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bf16()


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, of matrices or of stacks of them, in their dtype."""
    return (a.float() @ b.float()).to(a.dtype) if widens(a) else a @ b


def matmul_into(a_NK: torch.Tensor, b_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    """out = a b."""
    if widens(a_NK):
        out_NM.copy_(a_NK.float() @ b_KM.float())
    else:
        torch.mm(a_NK, b_KM, out=out_NM)


def linear(x: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
    """x wᵀ, [..., K] to [..., M], with gradients; on any device."""
    if not widens(x):
        return F.linear(x, weight_MK)
    product: torch.Tensor = _Linear.apply(x, weight_MK)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.mT)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = matmul(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = matmul(grad.flatten(0, -2).mT, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
