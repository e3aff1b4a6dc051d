"""Products of quantised matrices by npu_quant_matmul and npu_grouped_matmul (Ascend 950), which scale tiles of 32
numbers along the sum.

A tile that is longer, or a block, is some of 32 that have the same scale: so the recipes with powers of two are all
multiplied so, weight gradients included, where both operands have tiles of one row.

Weight gradients of experts are products of BF16: the operator reads FP8 turned, with rows sorted by group in memory
order, and scales in pairs that groups would share. A number of FP8 times a power of two is one of BF16, so that nothing
is lost but time.

M, N rows of the operands, K what is summed over, T = ⌈K / 64⌉ pairs of tiles; E groups, F and D output widths.
"""

import torch

from octofold.kernels.fp8_bits import decode_scale
from octofold.kernels.npu.grouped_mm import INNER, product_of_groups
from octofold.kernels.npu.quantize import UNIT, why_unsupported
from octofold.kernels.qtensor import QTensor

__all__ = ["pairs_of_scales", "scaled_grouped_inner_mm", "scaled_grouped_mm", "scaled_mm", "why_unsupported"]

E8M0_CODE = 293
"""torch_npu's, which wants scales as uint8 with it."""
OUT_CODES = {torch.bfloat16: 15, torch.float16: 5, torch.float32: 6}


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32", accumulation
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, n, k):
        # The operator takes no empty operand to sum over.
        return torch.zeros(m, n, dtype=out_dtype, device=a.data.device)
    product: torch.Tensor = torch.ops.npu.npu_quant_matmul(
        a.data.contiguous(),
        b.data.contiguous().t(),
        pairs_of_scales(b).transpose(0, 1),
        pertoken_scale=pairs_of_scales(a),
        output_dtype=OUT_CODES[out_dtype],
        scale_dtype=E8M0_CODE,
        pertoken_scale_dtype=E8M0_CODE,
        group_sizes=[1, 1, UNIT],
    )
    return product


def scaled_grouped_mm(
    a_NK: QTensor,
    b_EFK: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py, by npu_grouped_matmul; the group sizes stay on the device."""
    assert accumulation == "fp32", accumulation
    (n, k), f = a_NK.shape, b_EFK.shape[1]
    if 0 in (n, f, k):
        return torch.zeros(n, f, dtype=out_dtype, device=a_NK.data.device)
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [a_NK.data.contiguous()],
        [b_EFK.data.contiguous().mT],
        scale=[pairs_of_scales(b_EFK).transpose(1, 2)],
        per_token_scale=[pairs_of_scales(a_NK)],
        group_list=counts_E.cumsum(0),
        split_item=3,
        group_type=0,
        group_list_type=0,
        output_dtype=OUT_CODES[out_dtype],
        scale_dtype=E8M0_CODE,
        per_token_scale_dtype=E8M0_CODE,
    )[0]
    return product


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py, of operands decoded to BF16 (to FP32 where the result is wider than that).

    The group sizes stay on the device.
    """
    assert accumulation == "fp32", accumulation
    (f, t), d, unit = a_FT.shape, b_DT.shape[0], a_FT.format.tile[1]
    if 0 in (f, t, d):
        return torch.zeros(len(counts_E), f, d, dtype=out_dtype, device=a_FT.data.device)
    dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    # Each group has whole tiles (`quantize_groups`), filled up with zeros.
    ends_E = ((counts_E + (unit - 1)) // unit).cumsum(0) * unit
    a_TF, b_TD = (_decoded(x, dtype).t().contiguous() for x in (a_FT, b_DT))
    # The operator reads a transposed view as such, without a copy.
    return product_of_groups(a_TF.t(), b_TD, ends_E, INNER).to(out_dtype)


def _decoded(x: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [R, C] of tiles of one row."""
    wide = x.format.tile[1]
    scale = decode_scale(x.scale).to(dtype).unsqueeze(-1)
    return x.data.to(dtype).unflatten(-1, (-1, wide)).mul_(scale).flatten(-2)


def pairs_of_scales(x: QTensor) -> torch.Tensor:
    """uint8 [..., R, T, 2]: of each row and each tile of 32 numbers its scale, as e8m0."""
    rows, columns = x.shape[-2:]
    high, wide = x.format.tile
    scale = x.scale.contiguous().view(torch.uint8)
    if high != 1:
        scale = scale.repeat_interleave(high, -2)[..., :rows, :]
    if wide != UNIT:
        scale = scale.repeat_interleave(wide // UNIT, -1)
    pairs = -(-columns // (2 * UNIT))
    scale = scale[..., : 2 * pairs]
    return torch.nn.functional.pad(scale, (0, 2 * pairs - scale.shape[-1])).unflatten(-1, (pairs, 2))
