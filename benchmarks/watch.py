"""What watching precision costs: the quickstart's step with and without a sample, on this CPU.

    .venv/bin/python benchmarks/watch.py [--steps 10] [--threads 1]

Steps with and without a sample take turns. Printed: both medians, and the share of the time that watching takes at
`precision.watch_every`, one sample in so many steps.
"""

import argparse
import statistics
import time

import torch

from octofold.backends.config import BackendConfig
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.train.build import build_engine, build_model
from octofold.train.config import OptimConfig, RunConfig, TrainConfig, validate
from octofold.train.loss import summed_cross_entropy
from octofold.train.models.config import ModelConfig
from octofold.train.precision.apply import fp8_states
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.watch import Watch

SEQUENCES, LENGTH, VOCABULARY = 2, 512, 320


def main() -> None:
    """Time, then print three lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each kind, after two to warm up")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    backend = resolve("cpu")
    with joined(backend, BackendConfig(name="cpu", threads=options.threads), RankInfo()):
        config = RunConfig(
            model=ModelConfig(name="moe_10m"),
            precision=PrecisionConfig("fp8_block", arithmetic="emulate"),
            optim=OptimConfig(moments="bf16"),
            train=TrainConfig(global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES),
        )
        config = validate(config, 1)
        model = build_model(config, torch.device("cpu"), VOCABULARY).model
        engine = build_engine(model, config.optim, total_updates=1000)
        watch = Watch(fp8_states(model), 2, torch.device("cpu"))  # every second step
        positions_BS = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
        generator = torch.Generator().manual_seed(0)
        times_s: tuple[list[float], list[float]] = ([], [])
        for step in range(1, 2 * options.steps + 5):
            tokens_BS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
            began_s = time.perf_counter()
            watch.begin(step)
            loss = summed_cross_entropy(model(tokens_BS, positions_BS), tokens_BS.roll(-1, 1)) / tokens_BS.numel()
            engine.backward(loss, last=True)
            watch.collect()
            engine.step()
            if step > 4:
                times_s[step % 2 == 0].append(time.perf_counter() - began_s)
    plain_s, watched_s = (statistics.median(times) for times in times_s)
    every = config.precision.watch_every
    print(f"a step          {plain_s * 1e3:8.1f} ms")
    print(f"a watched step  {watched_s * 1e3:8.1f} ms")
    print(f"watching every {every} steps costs {(watched_s - plain_s) / plain_s / every:.2%}")


if __name__ == "__main__":
    main()
