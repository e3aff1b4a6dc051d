"""What a checkpoint costs: saving and loading beside a plain sequential write and read of the same bytes.

    python benchmarks/checkpoint.py --gb 2 --ranks 2 --folder /a/disk

Plain: each rank writes the bytes of its shards into one file, one block after the other, and flushes it to the disk;
and reads it back. Both sides read from the disk: pages are dropped before. Ours adds planning, checksums, a manifest,
the renaming. The stall is how long a training step waits when a checkpoint is saved beside it: in `save`, and before it
may update weights, with matrix products of `--pass-s` seconds between, which stand for the forward and backward passes.
How much longer those products take meanwhile is `slower`: on CPUs they share cores and memory with the save. Memory is
the most that a rank holds beyond its tensors while it saves and loads. Sides alternate; medians of `--rounds`.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from octofold.backends.cpu import usable_cores
from octofold.parallel.local_ranks import LocalRanks
from octofold.train.checkpoint.checksums import BLOCK_BYTES
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.checkpoint.writing import bytes_of, shard_of
from octofold.train.config import CheckpointConfig

LAYERS = 8
"""Of the stand-in for a model: experts, a matrix and norms in each, with two moments of everything."""


def state(total_bytes: int) -> dict[str, torch.Tensor]:
    """DTensors sharded over all ranks, experts and matrices and some small ones, of about so many bytes together."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    rows = max(total_bytes // (3 * LAYERS * 10 * 1024 * 4), dist.get_world_size())
    shapes: dict[str, tuple[int, ...]] = {"experts": (8, rows, 1024), "matrix": (2 * rows, 1024), "norm": (1024,)}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            for kind in ("model", "exp_avg", "exp_avg_sq"):
                whole = name == "norm"
                local = shape if whole else (shape[0] // dist.get_world_size(), *shape[1:])
                placement = Replicate() if whole else Shard(0)
                numbers = torch.randn(local)
                tensors[f"{kind}.{layer}.{name}"] = DTensor.from_local(numbers, mesh, [placement], run_check=False)
    return tensors


def plain_write(path: Path, shards: list[torch.Tensor]) -> None:
    """All bytes, one block after the other, and onto the disk."""
    with path.open("wb", buffering=0) as file:
        for shard in shards:
            data = bytes_of(shard)
            for begin in range(0, len(data), BLOCK_BYTES):
                file.write(data[begin : begin + BLOCK_BYTES])
        os.fsync(file.fileno())


def plain_read(path: Path, shards: list[torch.Tensor]) -> None:
    """The same bytes, into the same memory."""
    with path.open("rb", buffering=0) as file:
        for shard in shards:
            data = bytes_of(shard)
            for begin in range(0, len(data), BLOCK_BYTES):
                file.readinto(data[begin : begin + BLOCK_BYTES])


def forget_pages(folder: Path) -> None:
    """Have the next read come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Passes:
    """Products of matrices that take about so long."""

    def __init__(self, seconds: float) -> None:
        self._matrix = torch.randn(512, 512)
        self._count = 1
        took_s = self()
        while took_s < 0.1:
            self._count *= 2
            took_s = self()
        self._count = max(1, round(self._count * seconds / took_s))

    def __call__(self) -> float:
        """Do them; returns the seconds they took."""
        began_s = time.perf_counter()
        for _ in range(self._count):
            self._matrix @ self._matrix
        return time.perf_counter() - began_s


def measure(folder: Path, total_bytes: int, rounds: int, pass_s: float) -> dict[str, Any]:
    """On one rank, together with the others. Seconds are the slowest rank's."""
    torch.manual_seed(dist.get_rank())
    torch.set_num_threads(max(usable_cores() // dist.get_world_size(), 1))
    tensors = state(total_bytes)
    shards = [shard_of(tensor) for tensor in tensors.values()]
    plain = folder / f"plain-{dist.get_rank()}"
    device = torch.device("cpu")
    waits = Checkpointer(folder / "waits", CheckpointConfig(asynchronous=False, keep=1), device)
    beside = Checkpointer(folder / "beside", CheckpointConfig(keep=1), device)
    times: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        if dist.get_rank() == 0:
            forget_pages(folder)
        dist.barrier()
        began_s = time.perf_counter()
        action()
        took = torch.tensor(time.perf_counter() - began_s)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.setdefault(name, []).append(took.item())

    held_bytes = forget_peak()
    peaks = {}
    for step in range(1, rounds + 1):
        timed("plain write", lambda: plain_write(plain, shards))
        timed("save", lambda step=step: waits.save(step, tensors, {"step": step}))  # type: ignore[misc]
        timed("plain read", lambda: plain_read(plain, shards))
        timed("load", lambda: waits.load(folder / "waits", tensors))
        peaks["waiting"] = peak_bytes() - held_bytes
    passes = Passes(pass_s)
    for step in range(1, rounds + 2):
        dist.barrier()
        alone_s = passes()
        began_s = time.perf_counter()
        beside.save(step, tensors, {"step": step}, until_update=tensors.keys())
        between_s = passes()
        beside.let_go()
        told = torch.tensor([time.perf_counter() - began_s - between_s, between_s - alone_s])
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        for name, value in zip(("stall", "slower"), told.tolist(), strict=True):
            times.setdefault(name, []).append(value)
        timed("beside", beside.wait)
    peaks["beside"] = peak_bytes() - held_bytes
    local_bytes = sum(shard.numel() * shard.element_size() for shard in shards)
    # The first one beside training also gets its memory from the system.
    first_stall_s = times["stall"].pop(0)
    times["slower"].pop(0)
    return {
        "bytes": local_bytes,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "first_stall_s": first_stall_s,
        "beyond_state_bytes": peaks,
    }


def forget_peak() -> int:
    """Begin the measure of this process's peak anew; returns what it holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory this process has held, files' pages aside."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="of all ranks together")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pass-s", type=float, default=2.0, help="of a step's forward and backward passes")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        with LocalRanks(options.ranks) as ranks:
            of_ranks = ranks.run(measure, folder, int(options.gb * 1e9), options.rounds, options.pass_s, timeout_s=3600)
    finally:
        shutil.rmtree(folder)
    figures = of_ranks[0]
    total, seconds = sum(rank["bytes"] for rank in of_ranks), figures["seconds"]
    ratios = {
        "save_of_plain_write": seconds["plain write"] / seconds["save"],
        "load_of_plain_read": seconds["plain read"] / seconds["load"],
        "stall_of_save": seconds["stall"] / seconds["save"],
        "first_stall_of_save": figures["first_stall_s"] / seconds["save"],
    }
    if options.json:
        print(json.dumps({"total_bytes": total, "ranks": of_ranks, **ratios}))
        return
    print(f"{total / 1e9:.2f} GB on {options.ranks} rank(s), medians of {options.rounds}")
    for name, value in seconds.items():
        rate = f"  {total / 1e9 / value:6.2f} GB/s" if name not in ("stall", "slower") else ""
        print(f"  {name:<12} {value:7.3f} s{rate}")
    for name, value in ratios.items():
        print(f"  {name:<22} {value:.1%}")
    for name, value in figures["beyond_state_bytes"].items():
        print(f"  memory beyond the state, {name}: {value / 2**20:.0f} MiB of {figures['bytes'] / 2**20:.0f}")


if __name__ == "__main__":
    main()
