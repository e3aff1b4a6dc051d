"""The CPU: gloo between ranks, host memory, as many threads as the cores allow."""

import resource

import torch

from octofold.backends import gloo
from octofold.backends.base import Backend, Capabilities
from octofold.backends.host import usable_cores, usable_memory_bytes


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
