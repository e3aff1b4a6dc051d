"""Grouped products: npu_grouped_matmul. Legend: T tokens, D width, E experts, I width inside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops import quantized
from octofold.backends.software_npu.reference_ops.support import Kernels, unknown


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
    codes = [others.pop(name, None) for name in ("scale_dtype", "per_token_scale_dtype")]
    scales = {name: others.pop(name) for name in ("scale", "per_token_scale") if others.get(name)}
    if len(scales) == 2 and codes == [quantized.E8M0, quantized.E8M0] and (group_type, group_list_type) == (0, 0):
        out = {"output_dtype": others.pop("output_dtype", None)}
        return quantized.quantized_rows(x, weight, ends=group_list.tolist(), **scales, **out)
    given = {name: value for name, value in {**others, **scales}.items() if value not in (None, 0, [])}
    if given or len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or group_type not in (0, 2):
        raise unknown("npu_grouped_matmul", f"split_item={split_item} group_type={group_type} {sorted(given)}")
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


KERNELS: Kernels = {"npu_grouped_matmul": grouped_matmul}
