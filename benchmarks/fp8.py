"""What FP8 costs or gains beside BF16, op by op and for a layer of experts.

    .venv/bin/python benchmarks/fp8.py [--device cpu|cuda] [--threads 2] [--rounds 15]

On a CPU, which has no FP8 arithmetic, it prints the cost of emulation (recipe fp8_block): for the three products of a
dense and of a grouped linear layer, what quantising the operands takes and what the product takes, beside torch's BF16
product of the same shape, at the shapes of the quickstart and at larger ones. Then a layer with experts, forward and
backward. On an NVIDIA GPU with FP8 arithmetic see fp8_gpu.py, which this starts.

Contestants take turns round by round, so that a drift of the machine's speed meets all of them; printed are medians,
and ratios are medians of the rounds' ratios. Other work on the machine shows in all of it: run this on a quiet one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from fp8_gpu import report_gpu, report_targets
from fp8_layer import chosen_kernels, moe_step

from octofold.backends.registry import resolve
from octofold.kernels.qtensor import QTensor
from octofold.kernels.recipe import Recipe
from octofold.kernels.registry import FP8_OPS, Kernels
from octofold.train.models.config import ModelConfig
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.policy import recipe_for

CPU = torch.device("cpu")
BF16, FP8 = PrecisionConfig(), PrecisionConfig(name="fp8_block", arithmetic="emulate")
QUICKSTART = ModelConfig(name="moe_10m")
"""Its dimensions are the defaults."""
LARGER = replace(
    QUICKSTART, name="larger", hidden_size=1024, intermediate_size=3072, moe_intermediate_size=512, n_routed_experts=8
)
TOKENS = 1024
"""Of a micro-batch of a rank of the quickstart."""
WARM_UP = 3


def timed(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each contestant."""
    times_s: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + WARM_UP):
        for name, call in contestants.items():
            began_s = time.perf_counter()
            call()
            if number >= WARM_UP:
                times_s[name].append(time.perf_counter() - began_s)
    return times_s


@dataclass(frozen=True)
class Product:
    """One of a layer's three products: in BF16, what FP8 quantises for it, and the FP8 product itself."""

    name: str
    bf16: Callable[[], torch.Tensor]
    quantize: Callable[[], object]
    fp8: Callable[[], torch.Tensor]


def dense_products(kernels: Kernels, recipe: Recipe, rows: int, width_in: int, width_out: int) -> list[Product]:
    """Of y = x wᵀ. The weight was quantised before, as it is once a step; x was kept so for the weight gradient, whose
    quantising begins with dequantising it.
    """
    x, dy, w = (torch.randn(shape).bfloat16() for shape in ((rows, width_in), (rows, width_out), (width_out, width_in)))
    x_q, dy_q, w_q = (
        kernels.quantize(t, f) for t, f in ((x, recipe.activation), (dy, recipe.gradient), (w, recipe.weight))
    )

    def turned(t: torch.Tensor) -> QTensor:
        return kernels.quantize(t, recipe.inner_activation.transposed, transpose=True)

    inner = turned(dy), turned(x)
    return [
        Product(
            f"forward           {rows:>5} x {width_in:>4} -> {width_out:>4}",
            lambda: x @ w.t(),
            lambda: kernels.quantize(x, recipe.activation),
            lambda: kernels.scaled_mm(x_q, w_q),
        ),
        Product(
            f"input gradient    {rows:>5} x {width_out:>4} -> {width_in:>4}",
            lambda: dy @ w,
            lambda: kernels.quantize(dy, recipe.gradient),
            lambda: kernels.scaled_mm(dy_q, w_q.t()),
        ),
        Product(
            f"weight gradient   {width_out:>5} x {rows:>4} -> {width_in:>4}",
            lambda: dy.t() @ x,
            lambda: (turned(dy), turned(kernels.dequantize(x_q))),
            lambda: kernels.scaled_mm(*inner),
        ),
    ]


def grouped_products(
    kernels: Kernels, recipe: Recipe, counts: list[int], width_in: int, width_out: int
) -> list[Product]:
    """Of a stack of experts, as `dense_products`; in BF16 the product that runs without FP8 use."""
    rows, counts_E = sum(counts), torch.tensor(counts)
    x, dy = torch.randn(rows, width_in).bfloat16(), torch.randn(rows, width_out).bfloat16()
    w_EFD = torch.randn(len(counts), width_out, width_in).bfloat16()
    x_q, dy_q = kernels.quantize(x, recipe.activation), kernels.quantize(dy, recipe.gradient)
    w_q = kernels.quantize(w_EFD, recipe.weight)

    def turned(t: torch.Tensor) -> QTensor:
        return kernels.quantize_groups(t, counts_E, recipe.inner_activation)

    def weight_gradient() -> torch.Tensor:
        parts = zip(dy.split(counts), x.split(counts), strict=True)
        return torch.stack([left.t() @ right for left, right in parts])

    inner = turned(dy), turned(x)
    shape = f"{len(counts):>2} x {rows // len(counts):>3} x"
    return [
        Product(
            f"forward        {shape} {width_in:>4} -> {width_out:>4}",
            lambda: kernels.grouped_mm(x, w_EFD, counts_E),
            lambda: kernels.quantize(x, recipe.activation),
            lambda: kernels.scaled_grouped_mm(x_q, w_q, counts_E),
        ),
        Product(
            f"input gradient {shape} {width_out:>4} -> {width_in:>4}",
            lambda: kernels.grouped_mm(dy, w_EFD.mT, counts_E),
            lambda: kernels.quantize(dy, recipe.gradient),
            lambda: kernels.scaled_grouped_mm(dy_q, w_q.t(), counts_E),
        ),
        Product(
            f"weight gradient {len(counts):>2} x {width_out:>4} x {rows // len(counts):>3} -> {width_in:>4}",
            weight_gradient,
            lambda: (turned(dy), turned(kernels.dequantize(x_q))),
            lambda: kernels.scaled_grouped_inner_mm(*inner, counts_E),
        ),
    ]


def uneven(rows: int, groups: int) -> list[int]:
    """Rows of each group, between half and one and a half of the mean, that add up to `rows`."""
    ends = [round(rows * (group / groups) ** 1.2) for group in range(1, groups + 1)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def report_products(products: list[Product], rounds: int) -> None:
    """A line a product: milliseconds, what FP8 takes in all as a multiple of BF16, and how far the results differ."""
    for product in products:
        times_s = timed({"bf16": product.bf16, "quantize": product.quantize, "fp8": product.fp8}, rounds)
        bf16, quantize, fp8 = (1e3 * statistics.median(times) for times in times_s.values())
        ratio = statistics.median((q + p) / b for b, q, p in zip(*times_s.values(), strict=True))
        exact = product.bf16().float()
        error = float((product.fp8().float() - exact).norm() / exact.norm())
        print(f"  {product.name:44}{bf16:10.3f}{quantize:10.3f}{fp8:10.3f}{ratio:9.2f}x{error:10.1%}")


def report_layer(shape: ModelConfig, rounds: int) -> None:
    """The layer with experts in BF16 and in FP8, its weights quantised in every call or kept."""
    variants = {"BF16": (BF16, False), "FP8": (FP8, True), "FP8, quantised weights kept": (FP8, False)}
    steps = {name: moe_step(shape, p, CPU, tokens=TOKENS, anew=anew) for name, (p, anew) in variants.items()}
    times_s = timed(steps, rounds)
    for name, seconds in times_s.items():
        ratio = statistics.median(own / bf16 for own, bf16 in zip(seconds, times_s["BF16"], strict=True))
        print(
            f"  layer with experts, forward + backward: {name:30}{1e3 * statistics.median(seconds):8.2f}{ratio:8.2f}x"
        )


def report_cpu(rounds: int) -> None:
    """All of it, for both shapes."""
    recipe = recipe_for(FP8, "layers.1.mlp.experts.gate_up_proj")
    assert recipe is not None
    for shape in (QUICKSTART, LARGER):
        torch.manual_seed(0)
        kernels, choices = chosen_kernels(shape, FP8, CPU)
        print(
            f"\n{shape.name}: {TOKENS} tokens; "
            + ", ".join(f"{choice.op} {choice.provider}" for choice in choices if choice.op in FP8_OPS)
        )
        print(f"  {'milliseconds':44}{'BF16':>10}{'quantise':>10}{'product':>10}{'FP8/BF16':>10}{'differ by':>10}")
        hidden, width = shape.hidden_size, shape.moe_intermediate_size
        counts = uneven(TOKENS * shape.num_experts_per_tok, shape.n_routed_experts)
        report_products(dense_products(kernels, recipe, TOKENS, hidden, shape.intermediate_size), rounds)
        report_products(dense_products(kernels, recipe, TOKENS, shape.intermediate_size, hidden), rounds)
        report_products(grouped_products(kernels, recipe, counts, hidden, 2 * width), rounds)
        report_products(grouped_products(kernels, recipe, counts, width, hidden), rounds)
        report_layer(shape, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds on the CPU, after three to warm up")
    arguments = parser.parse_args()
    capabilities = resolve(arguments.device).capabilities(0)
    print(f"{capabilities.device_name}, torch {torch.__version__}")
    if arguments.device == "cuda":
        if not capabilities.fp8:
            raise SystemExit("this GPU has no FP8 arithmetic; --device cpu measures emulation")
        report_gpu(torch.device("cuda", 0))
    else:
        torch.set_num_threads(arguments.threads)
        print(f"{arguments.threads} threads; BF16 products {'native' if capabilities.bf16 else 'in FP32'}")
        report_cpu(arguments.rounds)
        report_targets({}, capabilities.device_name)


if __name__ == "__main__":
    main()
