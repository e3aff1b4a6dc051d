"""Norms, gates and rotations: npu_rms_norm, npu_swiglu, npu_rotary_mul, and gradients. Legend: T tokens, D width."""

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, gradients, unknown


def rms_norm(x_TD: Tensor, gamma_D: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / rms(x) * gamma, and 1 / rms(x) in FP32."""
    wide = x_TD.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * gamma_D.float()).to(x_TD.dtype), scale


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma (FP32)."""
    normed, dy = x_TD.float() * scale_T1, dy_TD.float()
    d_normed = dy * gamma_D.float()
    dx = scale_T1 * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return dx.to(x_TD.dtype), (dy * normed).reshape(-1, len(gamma_D)).sum(0)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, along `dim`."""
    gate, up = x.chunk(2, dim)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Gradient of x."""
    return gradients(lambda x: swiglu(x, dim), [x], dy)[0]


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> Tensor:
    """Rotary embedding: pairs are (i, i + half) in mode half, neighbours in mode interleave."""
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin
    if rotary_mode != "interleave":
        raise unknown("npu_rotary_mul", f"rotary_mode={rotary_mode}")
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def rotary_mul_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> list[Tensor]:
    """Gradients of x, cos and sin."""
    return gradients(lambda x, cos, sin: rotary_mul(x, cos, sin, rotary_mode), [x, cos, sin], dy)


KERNELS: Kernels = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
}
