"""Where the time of a layer with experts goes: share spent outside matrix products and exchange, forward and backward.

Of the wall time of a step: what is neither inside a product of the experts, the gate or the shared expert nor inside an
exchange, as the combination (`aten::bmm`), conversions of dtypes, and the time between operations. With several expert
ranks (CPU, gloo) each has as many tokens, and nothing overlaps with the exchange, whose time includes waiting for the
others; the slowest rank is shown. A CPU without BF16 instructions converts every operand of a BF16 product: measure
what it multiplies as it is, with --precision fp32.

    .venv/bin/python benchmarks/moe_step.py [--device cuda] [--tokens 4096] [--threads 2] [--expert-ranks 2]
"""

import argparse
import statistics
import time

import torch
from fp8_layer import moe_step
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from octofold.backends.collectives import Group, world
from octofold.backends.observing import Call, Told, observed
from octofold.backends.registry import resolve
from octofold.train.models.config import ModelConfig
from octofold.train.precision.config import PrecisionConfig

PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_mm", "scaled_mm", "grouped_mm")
"""Names, or parts of the names of Triton kernels, of what multiplies matrices."""
TARGET = 0.15


def kind_of(name: str) -> str:
    """product, or the operation's own name."""
    return "product" if name in PRODUCTS or any(p in name for p in PRODUCTS if not p.startswith("aten::")) else name


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
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32", "fp8_block"])
    parser.add_argument("--threads", type=int, default=2, help="of a CPU, shared by its ranks")
    parser.add_argument("--expert-ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up")
    options = parser.parse_args()
    shape = ModelConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.width,
        n_routed_experts=options.experts,
        num_experts_per_tok=options.chosen,
        first_k_dense_replace=0,
    )
    ranks = options.expert_ranks
    if ranks > 1 and options.device != "cpu":
        parser.error("--expert-ranks above 1 are CPU ranks")
    if ranks == 1:
        shares = [measured(options, shape, None)]
    else:
        from octofold.parallel.local_ranks import LocalRanks

        with LocalRanks(ranks) as started:
            shares = started.run(on_rank, options, shape, timeout_s=1800)
    kinds = max(shares, key=lambda of_rank: of_rank["outside"])
    device = resolve(options.device).capabilities(0).device_name
    print(f"{device}: {options.precision}, {ranks} expert rank(s), {options.tokens} tokens a rank, hidden")
    print(f"{options.hidden}, {options.experts} experts of {options.width}, {options.chosen} a token, one shared")
    print(f"a step takes {kinds.pop('seconds'):.2f} s, of which")
    outside = kinds.pop("outside")
    for name, share in sorted(kinds.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:48} {share:6.1%}")
    print(f"outside products and exchange: {outside:.1%} (target: below {TARGET:.0%})")


def on_rank(options: argparse.Namespace, shape: ModelConfig) -> dict[str, float]:
    """`measured` with experts split over the world."""
    return measured(options, shape, world())


def measured(options: argparse.Namespace, shape: ModelConfig, group: Group | None) -> dict[str, float]:
    """Shares of the wall time by kind, with `outside` and the median `seconds` of a step."""
    torch.set_num_threads(max(1, options.threads // options.expert_ranks))
    emulates = options.precision == "fp8_block" and options.device == "cpu"
    precision = PrecisionConfig(options.precision, arithmetic="emulate" if emulates else "native")
    step = moe_step(shape, precision, torch.device(options.device), tokens=options.tokens, anew=True, group=group)
    on_device = options.device == "cuda"
    step()
    times_s = []
    clock = Clock()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with observed(clock), profile(activities=activities) as profiler:
        for _ in range(options.steps):
            began_s = time.perf_counter()
            step()
            if on_device:
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - began_s)
    kinds = {"exchange": clock.seconds / sum(times_s)} if group else {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        if not kind.startswith(("c10d::", "gloo:", "ProfilerStep")):
            kinds[kind] = kinds.get(kind, 0.0) + own_us(event, on_device) / 1e6 / sum(times_s)
    outside = 1 - kinds.get("product", 0.0) - kinds.get("exchange", 0.0)
    return {**kinds, "outside": outside, "seconds": statistics.median(times_s)}


class Clock:
    """Adds up the seconds of collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_call(self, call: Call) -> Told:
        """Time every call."""
        return self.add

    def add(self, took_s: float) -> None:
        """Count a call."""
        self.seconds += took_s


if __name__ == "__main__":
    main()
