"""Token permutation around experts by Triton kernels: every row is read once and written once for each copy.

T tokens, K experts a token, N = T·K copies, D width.
"""

import torch

from octofold.kernels.permute import Order
from octofold.kernels.registry import Workload
from octofold.kernels.triton_support import why_no_triton

BLOCK = 4096
"""Numbers in registers of one program."""


def why_unsupported(workload: Workload) -> str | None:
    """NVIDIA GPUs, any dtype."""
    return why_no_triton(workload)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, inverse_N, copies):
        ctx.save_for_backward(inverse_N)
        ctx.copies = copies
        return _spread(x_TD.contiguous(), inverse_N, copies)

    @staticmethod
    def backward(ctx, grad_ND):
        (inverse_N,) = ctx.saved_tensors
        return _combine(grad_ND.contiguous(), None, inverse_N, ctx.copies), None, None


def permute(x_TD: torch.Tensor, order: Order, copies: int = 1) -> torch.Tensor:
    """As kernels/reference/permute.py."""
    permuted: torch.Tensor = _Permute.apply(x_TD, order.inverse_N, copies)
    return permuted


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weights_TK, inverse_N):
        y_ND, weights_TK = y_ND.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(y_ND, weights_TK, inverse_N)
        return _combine(y_ND, weights_TK, inverse_N, weights_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_TD):
        y_ND, weights_TK, inverse_N = ctx.saved_tensors
        return *_uncombine(grad_TD.contiguous(), y_ND, weights_TK, inverse_N), None


def unpermute(y_ND: torch.Tensor, weights_TK: torch.Tensor, order: Order) -> torch.Tensor:
    """As kernels/reference/permute.py."""
    combined: torch.Tensor = _Unpermute.apply(y_ND, weights_TK, order.inverse_N)
    return combined


def _spread(x_TD: torch.Tensor, inverse_N: torch.Tensor, copies: int) -> torch.Tensor:
    from octofold.kernels.triton_permute_kernels import spread_kernel

    tokens, width = x_TD.shape
    out_ND = x_TD.new_empty(tokens * copies, width)
    if out_ND.numel():
        blocks = _blocks(copies, width)
        grid = (tokens, -(-width // blocks["WIDTH"]))
        spread_kernel[grid](x_TD, out_ND, inverse_N.contiguous(), copies, width, **blocks)
    return out_ND


def _combine(y_ND: torch.Tensor, weights_TK: torch.Tensor | None, inverse_N: torch.Tensor, copies: int) -> torch.Tensor:
    from octofold.kernels.triton_permute_kernels import combine_kernel

    tokens, width = len(inverse_N) // copies, y_ND.shape[1]
    out_TD = y_ND.new_empty(tokens, width)
    if out_TD.numel():
        blocks = _blocks(copies, width)
        grid = (tokens, -(-width // blocks["WIDTH"]))
        inverse_N = inverse_N.contiguous()
        combine_kernel[grid](
            y_ND, weights_TK, out_TD, inverse_N, copies, width, **blocks, SUM_DTYPE=_sum_dtype(y_ND.dtype)
        )
    return out_TD


def _uncombine(
    grad_TD: torch.Tensor, y_ND: torch.Tensor, weights_TK: torch.Tensor, inverse_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from octofold.kernels.triton_permute_kernels import uncombine_kernel

    (tokens, copies), width = weights_TK.shape, y_ND.shape[1]
    grad_y_ND, grad_weights_TK = torch.empty_like(y_ND), torch.empty_like(weights_TK)
    if tokens:
        uncombine_kernel[(tokens,)](
            grad_TD,
            y_ND,
            weights_TK,
            grad_y_ND,
            grad_weights_TK,
            inverse_N.contiguous(),
            copies,
            width,
            **_blocks(copies, width),
            SUM_DTYPE=_sum_dtype(y_ND.dtype),
        )
    return grad_y_ND, grad_weights_TK


def _blocks(copies: int, width: int) -> dict[str, int]:
    """Copies and columns of one program."""
    from triton import next_power_of_2

    filled = next_power_of_2(copies)
    return {"COPIES": filled, "WIDTH": min(max(BLOCK // filled, 1), next_power_of_2(max(width, 1)))}


def _sum_dtype(dtype: torch.dtype) -> object:
    """Triton's FP32, or FP64 for FP64."""
    from triton.language import float32, float64

    return float64 if dtype == torch.float64 else float32
