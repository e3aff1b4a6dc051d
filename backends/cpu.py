"""The CPU: gloo between ranks, host memory, as many threads as the cores allow."""

import os
import resource
from pathlib import Path

import torch

from octofold.backends import gloo
from octofold.backends.base import Backend, Capabilities

CGROUP_LIMITS = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
"""Version 2, version 1; "max", or a huge number, where there is none."""


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def usable_memory_bytes() -> int:
    """The machine's memory, or what a container is allowed of it."""
    texts = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical_bytes, *(int(text) for text in texts if text.isdigit()))


class CpuBackend(Backend):
    """Always available; where every parallel layout is tested."""

    name = "cpu"
    collective_library = "gloo"

    def process_groups(self) -> str:
        return gloo.register()

    def why_unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def set_up(self, local_rank: int, local_world_size: int, threads: int) -> None:
        torch.set_num_threads(threads or max(1, usable_cores() // local_world_size))

    def capabilities(self, local_rank: int) -> Capabilities:
        # oneDNN multiplies BF16 natively with AVX512_BF16 or AMX; without them it emulates, correctly but slowly.
        native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        kind = f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s) a rank)"
        return Capabilities(kind, bf16=native_bf16, fp8=False, memory_bytes=usable_memory_bytes())

    def peak_memory_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
