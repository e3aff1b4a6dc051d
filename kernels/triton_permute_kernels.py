"""Triton kernels of kernels/triton_permute.py. Importing this file needs Triton.

T tokens, K experts a token, N = T·K copies, D width. A program takes one token and WIDTH columns; COPIES is K filled up
to a power of two, as Triton wants it. Nothing is added atomically, so that results do not depend on timing.
"""

# Only constants of compilation carry annotations, since those alone mean something to Triton.
# mypy: allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _copies(inverse_ptr, token, copies, COPIES: tl.constexpr):
    """The numbers t·K + k of a token's copies, their places in sorted order and which of them exist: [COPIES]."""
    copy = tl.arange(0, COPIES)
    number = token * copies + copy
    exists = copy < copies
    return number, tl.load(inverse_ptr + number, mask=exists, other=0), exists


@triton.jit
def spread_kernel(x_ptr, out_ptr, inverse_ptr, copies, width, COPIES: tl.constexpr, WIDTH: tl.constexpr):
    """out[place of copy k of token t] = x[t], bits as they are."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    _, place, exists = _copies(inverse_ptr, token, copies, COPIES)
    x = tl.load(x_ptr + token * width + column, mask=column < width, other=0)
    written = exists[:, None] & (column < width)[None, :]
    tl.store(
        out_ptr + place[:, None] * width + column[None, :],
        tl.broadcast_to(x[None, :], (COPIES, WIDTH)),
        mask=written,
    )


@triton.jit
def combine_kernel(
    y_ptr,
    weights_ptr,
    out_ptr,
    inverse_ptr,
    copies,
    width,
    COPIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """out[t] = Σ_k weight[t, k] · y[place of copy k of token t]; weights of 1 where weights_ptr is None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    number, place, exists = _copies(inverse_ptr, token, copies, COPIES)
    inside = exists[:, None] & (column < width)[None, :]
    y = tl.load(y_ptr + place[:, None] * width + column[None, :], mask=inside, other=0).to(SUM_DTYPE)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + number, mask=exists, other=0).to(y_ptr.dtype.element_ty)
        y = y * weight.to(SUM_DTYPE)[:, None]
    out = tl.sum(y, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * width + column, out, mask=column < width)


@triton.jit
def uncombine_kernel(
    grad_ptr,
    y_ptr,
    weights_ptr,
    grad_y_ptr,
    grad_weights_ptr,
    inverse_ptr,
    copies,
    width,
    COPIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """Both gradients of the weighted sum; a program takes all columns of one token.

    grad_y[place of copy k of token t] = weight[t, k] · grad[t], and grad_weights[t, k] = Σ_d grad[t, d] · y[place, d].
    """
    token = tl.program_id(0).to(tl.int64)
    number, place, exists = _copies(inverse_ptr, token, copies, COPIES)
    weight = tl.load(weights_ptr + number, mask=exists, other=0).to(y_ptr.dtype.element_ty).to(SUM_DTYPE)
    products = tl.zeros((COPIES, WIDTH), SUM_DTYPE)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = exists[:, None] & (column < width)[None, :]
        offsets = place[:, None] * width + column[None, :]
        grad = tl.load(grad_ptr + token * width + column, mask=column < width, other=0).to(SUM_DTYPE)[None, :]
        products += tl.load(y_ptr + offsets, mask=inside, other=0).to(SUM_DTYPE) * grad
        tl.store(grad_y_ptr + offsets, (weight[:, None] * grad).to(grad_y_ptr.dtype.element_ty), mask=inside)
    grad_weights = tl.sum(products, axis=1).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + number, grad_weights, mask=exists)
