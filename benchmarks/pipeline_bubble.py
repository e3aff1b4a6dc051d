"""Bubble and memory of every pipeline schedule, simulated from the action tables that train.

    python benchmarks/pipeline_bubble.py --ranks 8 --micro-batches 32 --layers 61 --depths 1

Times are in forward passes of one layer. A backward pass takes 2 of them, half for activations and half for weights,
unless said otherwise; activations are those of one layer and micro-batch.
"""

import argparse
from dataclasses import replace

from octofold.backends.errors import ConfigError
from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline_simulation import StageCost, simulate_schedule, stage_costs
from octofold.parallel.pipeline_split import SCHEDULES, check_pipeline, split_layers


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--depths", type=int, default=0, help="of multi-token prediction")
    parser.add_argument("--head", type=float, default=1.0, help="layers that the head counts as")
    parser.add_argument("--backward-input", type=float, default=1.0, help="of a layer, in its forward passes")
    parser.add_argument("--backward-weight", type=float, default=1.0, help="of a layer, in its forward passes")
    parser.add_argument("--send", type=float, default=0.0, help="of the stream to a neighbour, in layers' passes")
    asked = parser.parse_args()
    layer = StageCost(1.0, asked.backward_input, asked.backward_weight, send_s=asked.send)
    print(f"{'schedule':12} {'step':>9} {'bubble':>8} {'activations, fullest rank':>26}  layers of stages")
    base = ParallelConfig(pipeline=asked.ranks, data_shard=1, pipeline_head_layers=asked.head)
    for name in SCHEDULES:
        config = replace(base, pipeline_schedule=name)
        try:
            check_pipeline(config, asked.layers, asked.micro_batches)
        except ConfigError as error:
            print(f"{name:12} {str(error).splitlines()[0]}")
            continue
        found = simulate_schedule(config, asked.micro_batches, stage_costs(config, asked.layers, asked.depths, layer))
        layers = " ".join(str(len(part.layers)) for part in split_layers(config, asked.layers, asked.depths))
        share = f"{found.bubble_share:.1%}"
        print(f"{name:12} {found.step_s:9.1f} {share:>8} {max(found.peak_bytes):26.1f}  {layers}")


if __name__ == "__main__":
    main()
