"""What torch_npu's own operators (`torch.ops.npu`) compute, in plain PyTorch: their kernels on the software NPU.

They stand below torch_npu's autograd formulas, which stay in force and call the `_backward` operators here. Written
from the operators' documentation in the wheel; an operator or an argument that is not here fails. Legend: T tokens,
K copies of a token, D width, E experts, I width inside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from octofold.backends.errors import UserError


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
    return dx.to(x_TD.dtype), (dy * normed).flatten(0, -2).sum(0)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, along `dim`."""
    gate, up = x.chunk(2, dim)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Gradient of x."""
    return _gradients(lambda x: swiglu(x, dim), [x], dy)[0]


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> Tensor:
    """Rotary embedding: pairs are (i, i + half) in mode half, neighbours in mode interleave."""
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin
    if rotary_mode != "interleave":
        raise _unknown("npu_rotary_mul", f"rotary_mode={rotary_mode}")
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def rotary_mul_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> list[Tensor]:
    """Gradients of x, cos and sin."""
    return _gradients(lambda x, cos, sin: rotary_mul(x, cos, sin, rotary_mode), [x, cos, sin], dy)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Any = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: Any,
) -> list[Tensor]:
    """One product a group of one tensor. `group_type` 0: rows [T, D] x [E, D, I]; 2: the inner dim, [D, T] x [T, I].

    `group_list`: ends of the groups, or with `group_list_type` 1 their sizes.
    """
    given = {name: value for name, value in others.items() if value not in (None, 0, [])}
    if given or len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or group_type not in (0, 2):
        raise _unknown("npu_grouped_matmul", f"split_item={split_item} group_type={group_type} {sorted(given)}")
    (rows,), (matrix,) = x, weight
    numbers = group_list.tolist()
    ends = torch.tensor(numbers).cumsum(0).tolist() if group_list_type == 1 else numbers
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if group_type == 2:
        return [torch.stack([rows[:, start:end] @ matrix[start:end] for start, end in spans])]
    result = rows.new_zeros(rows.shape[0], matrix.shape[-1])
    for expert, (start, end) in enumerate(spans):
        result[start:end] = rows[start:end] @ matrix[expert]
    return [result]


def token_permute(
    tokens_TD: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows in the order of their experts, and where each copy went: [T * K, D] and int32 [T * K].

    `indices`: [T, K] or [T], the expert of each copy.
    """
    if padded_mode or num_out_tokens:
        raise _unknown("npu_moe_token_permute", f"padded_mode={padded_mode} num_out_tokens={num_out_tokens}")
    copies = indices.numel() // len(tokens_TD)
    order = indices.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return tokens_TD[order // copies], places.to(torch.int32)


def token_permute_grad(
    tokens_TD: Tensor, d_rows: Tensor, indices: Tensor, places: Tensor, padded_mode: bool = False
) -> Tensor:
    """Gradient of the tokens: of each the sum over its copies."""
    return token_permute_grad_v2(d_rows, places, len(tokens_TD), tokens_TD.dtype, len(places) // len(tokens_TD))


def token_permute_grad_v2(
    d_rows: Tensor, places: Tensor, tokens: int, dtype: torch.dtype, copies: int, padded_mode: bool = False
) -> Tensor:
    """The same, for who no longer has the tokens."""
    return d_rows[places.long()].view(tokens, copies, -1).float().sum(1).to(dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_permute_grad": token_permute_grad,
    "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
}
"""Operator -> its kernel."""


def install() -> torch.library.Library:
    """Register them; they stay as long as what is returned lives."""
    library = torch.library.Library("npu", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, _on_npu(kernel), "PrivateUse1", allow_override=True)
    return library


def _on_npu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel on NPU tensors: it sees their memory as CPU tensors, and its results are copied."""

    def call(*args: Any, **kwargs: Any) -> Any:
        devices = []

        def seen(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.device.type == "npu"):
                return value
            devices.append(value.device)
            return torch.ops.octofold_software_npu.cpu_view(value)

        given, named = tree_map(seen, (args, kwargs))
        with torch.no_grad():
            results = kernel(*given, **named)
        return tree_map(lambda value: value.to(devices[0]) if isinstance(value, Tensor) else value, results)

    return call


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, dy))


def _unknown(op: str, shown: str) -> UserError:
    rule = f"the software NPU computes {op} for the arguments that backends/software_npu/reference_ops.py knows"
    return UserError(f"{op} {shown}\n  rule:   {rule}\n  remedy: add them there")
