"""Products of quantised matrices by Triton kernels, for GPUs with FP8 tensor cores: no host synchronisation.

Operands are best when what is summed over is contiguous, as FP8 tensor cores want it; transposed views are multiplied
too, more slowly. Steps of fewer than 128 terms (MX, short tiles) cost speed alike.

E groups; letters as in kernels/reference/scaled_mm.py.
"""

from math import gcd
from typing import Any

import torch

from octofold.kernels.qtensor import QTensor
from octofold.kernels.reference.quantize import GROUP_UNIT
from octofold.kernels.registry import Workload
from octofold.kernels.triton_support import interpreted, why_no_triton

LONGEST_STEP = 128
"""Terms that are added on the tensor cores before FP32 registers take over."""
SHORTEST_BLOCK = 32
"""Terms that tensor cores take at least."""
FP8_DOT_CAPABILITY = (8, 9)
"""The first GPUs that multiply FP8."""
TMA_CAPABILITY = (9, 0)
TMA_ALIGNMENT_BYTES = 16


def why_unsupported(workload: Workload) -> str | None:
    """NVIDIA GPUs that multiply FP8."""
    if reason := why_no_triton(workload):
        return reason
    if workload.accumulation != "fp32":
        return f"adds in FP32, not as {workload.accumulation}"
    on_gpu = workload.device_type == "cuda" and torch.cuda.is_available()
    if on_gpu and torch.cuda.get_device_capability() < FP8_DOT_CAPABILITY:
        return "needs a GPU that multiplies FP8 (compute capability 8.9)"
    return None


def scaled_mm(
    a: QTensor, b: QTensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulation: str = "fp32"
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    (rows, terms), columns = a.shape, b.shape[0]
    out_MN = torch.empty(rows, columns, dtype=out_dtype, device=a.data.device)
    if out_MN.numel() == 0:
        return out_MN

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (-(-rows // meta["BLOCK_M"]) * -(-columns // meta["BLOCK_N"]),)

    _launch("scaled_mm", grid, (_operand(a), _operand(b), out_MN, rows, columns, terms), rows, _tiles(a, b, terms))
    return out_MN


def scaled_grouped_mm(
    a_NK: QTensor,
    b_EFK: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    (rows, terms), (groups, columns) = a_NK.shape, b_EFK.shape[:2]
    out_NF = torch.empty(rows, columns, dtype=out_dtype, device=a_NK.data.device)
    if out_NF.numel() == 0:
        return out_NF

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return ((rows // meta["BLOCK_M"] + groups) * -(-columns // meta["BLOCK_N"]),)

    operands = (_operand(a_NK), _operand(b_EFK), counts_E.contiguous(), out_NF, rows, columns, terms, groups)
    constants = {"GROUPS": _power_of_two(groups), **_tiles(a_NK, b_EFK, terms)}
    _launch("scaled_grouped_mm", grid, operands, rows, constants)
    return out_NF


def scaled_grouped_inner_mm(
    a_FT: QTensor,
    b_DT: QTensor,
    counts_E: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulation: str = "fp32",
) -> torch.Tensor:
    """As kernels/reference/scaled_mm.py."""
    assert accumulation == "fp32"
    (rows, terms), columns, groups = a_FT.shape, b_DT.shape[0], len(counts_E)
    out_EFD = torch.empty(groups, rows, columns, dtype=out_dtype, device=a_FT.data.device)
    if out_EFD.numel() == 0:
        return out_EFD

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (groups * -(-rows // meta["BLOCK_M"]) * -(-columns // meta["BLOCK_N"]),)

    unit = a_FT.format.tile[1] or GROUP_UNIT
    operands = (_operand(a_FT), _operand(b_DT), counts_E.contiguous(), out_EFD, rows, columns)
    constants = {"GROUPS": _power_of_two(groups), "UNIT": unit, **_tiles(a_FT, b_DT, unit)}
    # How many terms there are changes with every batch; tuning looks at their class alone.
    _launch("scaled_grouped_inner_mm", grid, (*operands, _power_of_two(terms), groups), rows, constants)
    return out_EFD


def _operand(x: QTensor) -> tuple[Any, ...]:
    """Data, scales, and the strides of both, as the kernels take them."""
    scale = x.scale if x.scale.dtype == torch.float32 else x.scale.view(torch.uint8)
    return x.data, scale, x.data.stride(), scale.stride()


def _tiles(a: QTensor, b: QTensor, terms: int) -> dict[str, Any]:
    """Constants of the kernels that follow from the formats, and from how the operands lie in memory.

    Args:
        terms: what the length of every sum is a multiple of.
    """
    step = gcd(a.format.tile[1], b.format.tile[1]) or LONGEST_STEP
    if step > LONGEST_STEP:
        step = gcd(step, LONGEST_STEP)
    block = max(SHORTEST_BLOCK, _power_of_two(step))
    return {
        "TILES": (*a.format.tile, *b.format.tile),
        "STEPS": (step, block, bool(terms % step) or step < block),
        "ALIGNED": step == block and _is_aligned(a.data) and _is_aligned(b.data),
    }


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA can copy from it."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < TMA_CAPABILITY:
        return False
    places = (x.data_ptr(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(place % TMA_ALIGNMENT_BYTES == 0 for place in places)


def _power_of_two(count: int) -> int:
    """The smallest that is not below a positive count."""
    return 1 << (count - 1).bit_length()


def _launch(op: str, grid: Any, operands: tuple[Any, ...], rows: int, constants: dict[str, Any]) -> None:
    """Run a kernel, tuned; sizes of its blocks are measured for a class of rows, since rows change with every batch."""
    from triton import set_allocator

    from octofold.kernels.triton_scaled_mm_kernels import CONFIGS, TUNED, possible

    kernel, blocks = TUNED[op], {}
    if interpreted():
        # Nothing to measure: the smallest blocks, with TMA where it could copy.
        configs = possible(CONFIGS, {}, **constants)
        kernel, blocks = kernel.fn, min((c.kwargs for c in configs), key=lambda c: c["BLOCK_M"] * c["BLOCK_N"])
    # For TMA's descriptors. What is set is known to this thread alone, and autograd has several.
    set_allocator(_workspace)
    kernel[grid](*operands, _power_of_two(rows), **constants, **blocks)


def _workspace(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory of a kernel's own, `size` bytes; torch aligns better than any kernel asks for."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")
