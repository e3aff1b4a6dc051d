"""FP8 on an NVIDIA GPU at DeepSeek-V3's shapes; benchmarks/fp8.py starts this where there is one.

Printed, with the targets for an H200 beside them: quantising as a share of the copy bandwidth measured here; dense and
grouped products in TFLOP/s beside BF16, torch's own FP8 product and DeepGEMM where it is installed; a layer with
experts, forward and backward, beside BF16. Ops are timed by CUDA events around graphs of many calls, so that launching
them costs nothing, as the median of ten; the layer, which no graph holds, as the median of calls launched one by one.
A target that nothing was measured for says "not yet measured".
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from fp8_layer import chosen_kernels, moe_step

from octofold.kernels.qtensor import Format, QTensor
from octofold.kernels.recipe import block_recipe
from octofold.kernels.registry import FP8_OPS, Kernels
from octofold.train.models.config import ModelConfig
from octofold.train.precision.config import PrecisionConfig

DENSE = [(4096, 7168, 16384), (4096, 2048, 7168), (4096, 7168, 2048), (4096, 24576, 1536)]
"""M, N, K."""
GROUPED = [(4, 7168, 4096), (4, 2048, 7168), (32, 7168, 4096), (32, 2048, 7168)]
"""Groups, input and output width."""
GROUPED_ROWS = 32768
ROW_UNIT = 128
"""Groups have whole multiples of it, which DeepGEMM wants; ours need not."""
QUANTISED_ROWS = 16384
"""With 7168 columns, several times what a GPU caches."""
BF16, FP8 = PrecisionConfig(), PrecisionConfig(name="fp8_block")
RECIPE = block_recipe("fp8_block", 128, "ue8m0", torch.float8_e4m3fn)
LAYER = replace(
    ModelConfig(name="deepseek_v3 layer, 32 experts of a rank"),
    hidden_size=7168,
    moe_intermediate_size=2048,
    n_routed_experts=32,
    num_experts_per_tok=8,
)
LAYER_TOKENS = 4096
LAYER_ROUNDS, WARM_UP = 10, 3
TARGETS = {
    "quantise, least share of copy bandwidth": (0.85, "{:.0%}"),
    "dense product 4096 x 7168 x 16384, TFLOP/s": (1200.0, "{:,.0f}"),
    "grouped products forward, least, TFLOP/s": (1000.0, "{:,.0f}"),
    "layer with experts, times BF16": (1.5, "{:.2f}"),
}
"""On an H200: the figure, and how it is written."""


@dataclass(frozen=True)
class Failure:
    """Why a contestant of others could not run."""

    reason: str
    cell: str = "failed"


NOT_INSTALLED = Failure("not installed", "not installed")


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, many of them in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=50, return_mode="median")) / 1e3


def attempt(call: Callable[[], object]) -> float | Failure:
    """`seconds` of a library that may not support this GPU or shape; what it says is printed in its place."""
    try:
        return seconds(call)
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
        return Failure(str(error).splitlines()[0] if str(error) else type(error).__name__)


def report_gpu(device: torch.device) -> None:
    """All of it."""
    torch.manual_seed(0)
    kernels, choices = chosen_kernels(LAYER, FP8, device)
    for choice in choices:
        if choice.op in FP8_OPS:
            print(f"  {choice.op:26}{choice.provider}" + "".join(f"; not {n}: {r}" for n, r in choice.rejected.items()))
    figures: dict[str, float] = {}
    names = iter(TARGETS)
    with device:
        figures[next(names)] = report_quantize(kernels)
        figures[next(names)] = report_dense(kernels)
        figures[next(names)] = report_grouped(kernels)
        figures[next(names)] = report_layer(device)
    report_targets(figures, torch.cuda.get_device_name(device))


def report_targets(figures: dict[str, float], device_name: str) -> None:
    """The targets, which were set for an H200, with what was measured beside them; nothing is on a CPU."""
    is_meant = "H200" in device_name
    elsewhere = device_name if figures and not is_meant else ""
    print(f"\n  {'target on an H200':50}{'target':>10}{'H200':>20}  {elsewhere}")
    for name, (target, form) in TARGETS.items():
        found = form.format(figures[name]) if name in figures else ""
        meant, other = (found, "") if is_meant and found else ("not yet measured", found)
        print(f"  {name:50}{form.format(target):>10}{meant:>20}  {other}")


def report_quantize(kernels: Kernels) -> float:
    """Bytes read and written a second as a share of a copy's; returns the least share."""
    x = torch.randn(QUANTISED_ROWS, 7168, dtype=torch.bfloat16)
    gate_up = torch.randn(QUANTISED_ROWS, 2 * 2048, dtype=torch.bfloat16)
    weight = torch.randn(16384, 7168, dtype=torch.bfloat16)
    counts_E = torch.tensor(uneven(QUANTISED_ROWS, 32))
    to = torch.empty_like(x)
    copy = 2 * x.nbytes / seconds(lambda: to.copy_(x))
    print(f"\n  a copy moves {copy / 1e12:.2f} TB/s\n  {'quantise':50}{'TB/s':>10}{'of copy':>10}")
    cases: dict[str, tuple[Callable[[], QTensor], torch.Tensor]] = {
        "1x128": (lambda: kernels.quantize(x, RECIPE.activation), x),
        "128x1, transposed": (lambda: kernels.quantize(x, Format((128, 1)), transpose=True), x),
        "rows by group, transposed": (lambda: kernels.quantize_groups(x, counts_E, RECIPE.inner_activation), x),
        "128x128": (lambda: kernels.quantize(weight, RECIPE.weight), weight),
        "128x128, transposed": (lambda: kernels.quantize(weight, RECIPE.weight, transpose=True), weight),
        "1x128 of a SwiGLU": (lambda: kernels.swiglu_quantize(gate_up, RECIPE.activation), gate_up),
    }
    shares = []
    for name, (call, source) in cases.items():
        speed = (source.nbytes + call().size_bytes) / seconds(call)
        shares.append(speed / copy)
        print(f"  {name:50}{speed / 1e12:10.2f}{shares[-1]:10.0%}")
    return min(shares)


def print_products(name: str, operations: float, times_s: dict[str, float | Failure]) -> None:
    """A line: TFLOP/s of each contestant; the reasons of those that could not run stand below it."""
    cells = [t.cell if isinstance(t, Failure) else f"{operations / t / 1e12:,.0f}" for t in times_s.values()]
    print(f"  {name:42}" + "".join(f"{cell:>14}" for cell in cells))
    for contestant, failed in times_s.items():
        if isinstance(failed, Failure) and failed != NOT_INSTALLED:
            print(f"    {contestant}: {failed.reason}")


def report_dense(kernels: Kernels) -> float:
    """TFLOP/s of a bᵀ; returns that of the first shape."""
    print(f"\n  {'dense, M x N x K (TFLOP/s)':42}{'octofold':>14}{'BF16 matmul':>14}{'scaled_mm':>14}{'DeepGEMM':>14}")
    figures = []
    for m, n, k in DENSE:
        times_s = dense_times(kernels, m, n, k)
        print_products(f"{m} x {n} x {k}", 2 * m * n * k, times_s)
        figures.append(tflops(2 * m * n * k, times_s["octofold"]))
    return figures[0]


def dense_times(kernels: Kernels, m: int, n: int, k: int) -> dict[str, float | Failure]:
    """Seconds of each contestant."""
    a, b = (torch.randn(rows, k, dtype=torch.bfloat16) for rows in (m, n))
    a_q, b_q = kernels.quantize(a, RECIPE.activation), kernels.quantize(b, RECIPE.weight)
    return {
        "octofold": seconds(lambda: kernels.scaled_mm(a_q, b_q)),
        "BF16 matmul": seconds(lambda: torch.matmul(a, b.t())),
        "scaled_mm": torch_scaled_mm(a_q, b_q),
        "DeepGEMM": deep_gemm_dense(a_q, b_q),
    }


def tflops(operations: float, time_s: float | Failure) -> float:
    """Of a contestant that ran."""
    assert isinstance(time_s, float)
    return operations / time_s / 1e12


def torch_scaled_mm(a: QTensor, b: QTensor) -> float | Failure:
    """torch's FP8 product with a scale a row, on the same data: other numbers, the same work."""
    recipe = F.ScalingType.RowWise
    scale_a, scale_b = torch.ones(a.shape[0], 1), torch.ones(1, b.shape[0])
    bf16 = torch.bfloat16
    return attempt(lambda: F.scaled_mm(a.data, b.data.t(), scale_a, recipe, scale_b, recipe, output_dtype=bf16))


def deep_gemm_dense(a: QTensor, b: QTensor) -> float | Failure:
    """DeepGEMM's product of the same operands; it takes FP32 scales on Hopper."""
    if find_spec("deep_gemm") is None:
        return NOT_INSTALLED
    import deep_gemm

    out_MN = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    operands = [(x.data, x.scale.float()) for x in (a, b)]
    return attempt(lambda: deep_gemm.fp8_gemm_nt(*operands, out_MN))


def deep_gemm_grouped(a: QTensor, b: QTensor, counts: list[int]) -> float | Failure:
    """The same over groups of rows."""
    if find_spec("deep_gemm") is None:
        return NOT_INSTALLED
    import deep_gemm

    out_NF = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    groups_N = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    operands = [(x.data, x.scale.float()) for x in (a, b)]
    return attempt(lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*operands, out_NF, groups_N))


def uneven(rows: int, groups: int) -> list[int]:
    """Multiples of `ROW_UNIT`, the largest several times the smallest, that add up to `rows`."""
    ends = [round(rows / ROW_UNIT * (group / groups) ** 1.4) * ROW_UNIT for group in range(1, groups + 1)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def report_grouped(kernels: Kernels) -> float:
    """TFLOP/s of the three products of a stack of experts; returns the least of the forward products."""
    print(f"\n  {'grouped (TFLOP/s)':42}{'octofold':>14}{'BF16 grouped':>14}{'DeepGEMM':>14}")
    least = float("inf")
    for groups, width_in, width_out in GROUPED:
        counts = uneven(GROUPED_ROWS, groups)
        shown = f"{groups} x {min(counts)} to {max(counts)} rows, {width_in} -> {width_out}"
        operations = 2 * GROUPED_ROWS * width_in * width_out
        products = grouped_products(kernels, counts, width_in, width_out)
        print(f"  {shown}")
        for name, times_s in products.items():
            print_products(f"  {name}", operations, times_s)
        least = min(least, tflops(operations, products["forward"]["octofold"]))
    return least


def grouped_products(
    kernels: Kernels, counts: list[int], width_in: int, width_out: int
) -> dict[str, dict[str, float | Failure]]:
    """Seconds of each product and contestant."""
    counts_E = torch.tensor(counts)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    x, dy = (torch.randn(GROUPED_ROWS, width, dtype=torch.bfloat16) for width in (width_in, width_out))
    w_EFD = torch.randn(len(counts), width_out, width_in, dtype=torch.bfloat16)
    x_q, dy_q = kernels.quantize(x, RECIPE.activation), kernels.quantize(dy, RECIPE.gradient)
    w_q = kernels.quantize(w_EFD, RECIPE.weight)
    turned_q = kernels.quantize(w_EFD, RECIPE.turned_weight.transposed, transpose=True)
    inner = [kernels.quantize_groups(t, counts_E, RECIPE.inner_activation) for t in (dy, x)]
    return {
        "forward": {
            "octofold": seconds(lambda: kernels.scaled_grouped_mm(x_q, w_q, counts_E)),
            "BF16 grouped": attempt(lambda: F.grouped_mm(x, w_EFD.mT, offs=ends_E)),
            "DeepGEMM": deep_gemm_grouped(x_q, w_q, counts),
        },
        "input gradient": {
            "octofold": seconds(lambda: kernels.scaled_grouped_mm(dy_q, turned_q, counts_E)),
            "BF16 grouped": attempt(lambda: F.grouped_mm(dy, w_EFD, offs=ends_E)),
            "DeepGEMM": deep_gemm_grouped(dy_q, turned_q, counts),
        },
        "weight gradient": {
            "octofold": seconds(lambda: kernels.scaled_grouped_inner_mm(*inner, counts_E)),
            "BF16 grouped": attempt(lambda: F.grouped_mm(dy.t(), x, offs=ends_E)),
        },
    }


def report_layer(device: torch.device) -> float:
    """Milliseconds of the layer with experts; returns how many times BF16's speed FP8 has, weights quantised anew."""
    variants = {"BF16": (BF16, False), "FP8": (FP8, True), "FP8, quantised weights kept": (FP8, False)}
    print(f"\n  {LAYER.name}, {LAYER_TOKENS} tokens, forward + backward (ms)")
    medians_ms: dict[str, float] = {}
    for name, (precision, anew) in variants.items():
        step = moe_step(LAYER, precision, device, tokens=LAYER_TOKENS, anew=anew)
        medians_ms[name] = statistics.median(event_times_ms(step))
        print(f"  {name:42}{medians_ms[name]:14.2f}{medians_ms['BF16'] / medians_ms[name]:13.2f}x")
        del step
        torch.cuda.empty_cache()
    return medians_ms["BF16"] / medians_ms["FP8"]


def event_times_ms(step: Callable[[], None]) -> list[float]:
    """Of calls launched one after the other, after some to warm up."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(LAYER_ROUNDS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]
