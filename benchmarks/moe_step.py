"""Where the time of a layer with experts goes: share spent outside matrix products and exchange, forward and backward.

One rank holds all experts (nothing is exchanged); the profiler's own times of the operations are summed by kind.

    .venv/bin/python benchmarks/moe_step.py [--device cuda] [--tokens 4096] [--threads 2] [--precision bf16]
"""

import argparse
import statistics
import time

import torch
from fp8_layer import moe_step
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from octofold.backends.registry import resolve
from octofold.train.models.config import ModelConfig
from octofold.train.precision.config import PrecisionConfig

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_mm", "scaled_mm", "grouped_mm")
"""Names, or parts of the names of Triton kernels, of what multiplies matrices."""
EXCHANGES = ("c10d::", "gloo:", "nccl:")
TARGET = 0.15


def kind_of(name: str) -> str:
    """product, exchange, or the operation's own name."""
    if name in PRODUCTS or any(part in name for part in PRODUCTS if not part.startswith("aten::")):
        return "product"
    return "exchange" if name.startswith(EXCHANGES) else name


def own_us(event: FunctionEventAvg, on_device: bool) -> float:
    """Microseconds that the operation itself took."""
    return float(event.self_device_time_total if on_device else event.self_cpu_time_total)


def main() -> None:
    """Run, then print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp8_block"])
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = ModelConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.width,
        n_routed_experts=options.experts,
        num_experts_per_tok=options.chosen,
        first_k_dense_replace=0,
    )
    emulates = options.precision != "bf16" and options.device == "cpu"
    precision = PrecisionConfig(options.precision, arithmetic="emulate" if emulates else "native")
    step = moe_step(shape, precision, torch.device(options.device), tokens=options.tokens, anew=True)
    on_device = options.device == "cuda"
    step()
    times_s = []
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        for _ in range(options.steps):
            began_s = time.perf_counter()
            step()
            if on_device:
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - began_s)
    kinds: dict[str, float] = {}
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + own_us(event, on_device)
    total_us = sum(kinds.values())
    outside = 1 - (kinds.get("product", 0.0) + kinds.get("exchange", 0.0)) / total_us
    print(
        f"{resolve(options.device).capabilities(0).device_name}: {options.precision}, {options.tokens} tokens, hidden"
    )
    print(f"{options.hidden}, {options.experts} experts of {options.width}, {options.chosen} a token, one shared")
    print(f"a step takes {statistics.median(times_s):.2f} s; of the time of its operations")
    for name, spent_us in sorted(kinds.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:48} {spent_us / total_us:6.1%}")
    print(f"outside products and exchange: {outside:.1%} (target: below {TARGET:.0%})")


if __name__ == "__main__":
    main()
