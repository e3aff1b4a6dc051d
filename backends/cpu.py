"""The CPU: gloo between ranks, host memory, as many threads as the cores allow."""

import resource
from functools import cache

import torch

from octofold.backends import gloo
from octofold.backends.base import Backend, Capabilities
from octofold.backends.host import usable_cores, usable_memory_bytes


@cache
def multiplies_bf16() -> bool:
    """Whether oneDNN has instructions for products of BF16 numbers here: AVX512_BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class CpuBackend(Backend):
    """Always available; where every parallel layout is tested."""

    name = "cpu"
    collective_library = "gloo"
    deterministic = True

    def process_groups(self) -> str:
        return gloo.register()

    def why_unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def set_up(self, local_rank: int, local_world_size: int, threads: int) -> None:
        torch.set_num_threads(threads or max(1, usable_cores() // local_world_size))

    def capabilities(self, local_rank: int) -> Capabilities:
        kind = f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s) a rank)"
        return Capabilities(kind, bf16=multiplies_bf16(), fp8=False, memory_bytes=usable_memory_bytes())

    def peak_memory_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
