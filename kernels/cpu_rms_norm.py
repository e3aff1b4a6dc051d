"""RMSNorm for CPUs: few vectorised passes, several times faster than torch's composite backward."""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Written for host memory."""
    return None if workload.device_type == "cpu" else f"made for CPUs, the run is on {workload.device_type}"


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RmsNorm(torch.autograd.Function):
    # Operands are cast before they meet: an in-place product of two dtypes goes through temporary copies.
    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = _exact(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x.to(exact) * inverse_rms).mul_(weight.to(exact)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        # With n = x·r, r = 1/√(mean x² + eps): dx = r·(g·w − n·mean(g·w·n)), dw = Σ g·n.
        x, weight, inverse_rms = ctx.saved_tensors
        exact = _exact(x.dtype)
        normed, weight_exact = x.to(exact) * inverse_rms, weight.to(exact)
        product = normed * grad.to(exact)
        grad_weight = product.reshape(-1, product.shape[-1]).sum(0)
        mean = product.mul_(weight_exact).mean(-1, keepdim=True)
        grad_x = (grad.to(exact) * weight_exact).sub_(normed.mul_(mean)).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As kernels/reference/rms_norm.py."""
    normed: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return normed
