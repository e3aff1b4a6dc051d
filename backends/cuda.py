"""NVIDIA GPUs through CUDA and NCCL."""

import torch

from octofold.backends.base import Backend, Capabilities
from octofold.backends.errors import ConfigError

FP8_COMPUTE_CAPABILITY = (8, 9)
"""Ada and Hopper brought FP8 tensor cores."""
MX_COMPUTE_CAPABILITY = (10, 0)
"""Blackwell brought microscaling."""
PEAK_FLOPS = {
    ("NVIDIA H100 80GB HBM3", 132): {"bf16": 989e12, "fp8": 1979e12},
    ("NVIDIA H200", 132): {"bf16": 989e12, "fp8": 1979e12},
    ("NVIDIA H800", 132): {"bf16": 989e12, "fp8": 1979e12},
}
"""Dense peaks of the SXM modules, from NVIDIA's datasheets, by what the driver says: name and multiprocessors. Boards
and partitions (MIG) of the same chip have other names, clocks or sizes; of those nothing is claimed."""


class CudaBackend(Backend):
    """One GPU a local rank."""

    name = "cuda"
    collective_library = "nccl"

    def why_unavailable(self) -> str | None:
        if not torch.backends.cuda.is_built():
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU or driver"
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def set_up(self, local_rank: int, local_world_size: int, threads: int) -> None:
        if local_world_size > torch.cuda.device_count():
            shown = f"{local_world_size} local ranks, {torch.cuda.device_count()} GPU(s)"
            rule = "each local rank has a GPU of its own"
            raise ConfigError("launch.nproc_per_node", shown, rule, "fewer ranks, or backend=cpu")
        if threads:
            torch.set_num_threads(threads)
        torch.cuda.set_device(local_rank)

    def capabilities(self, local_rank: int) -> Capabilities:
        properties = torch.cuda.get_device_properties(local_rank)
        level = (properties.major, properties.minor)
        return Capabilities(
            properties.name,
            bf16=level >= (8, 0),
            fp8=level >= FP8_COMPUTE_CAPABILITY,
            mxfp8=level >= MX_COMPUTE_CAPABILITY,
            memory_bytes=properties.total_memory,
            peak_flops=PEAK_FLOPS.get((properties.name, properties.multi_processor_count)),
        )

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()
