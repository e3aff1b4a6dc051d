"""Huawei Ascend NPUs through torch_npu and HCCL; or the software NPU, where this process was started for it."""

import os
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch

from octofold.backends import ascend_soc, hccl
from octofold.backends.base import Backend, Capabilities
from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError
from octofold.backends.software_npu.activate import activate, is_active


class AscendBackend(Backend):
    """One NPU a local rank (on Atlas A3 a die of two: each is a device)."""

    name = "ascend"
    collective_library = "hccl"
    deterministic = True

    def prepare_groups(self, config: BackendConfig) -> timedelta:
        deterministic = torch.are_deterministic_algorithms_enabled()
        os.environ.update(hccl.variables(config, os.environ, deterministic=deterministic))
        return hccl.watchdog_timeout(config, os.environ)

    def group_settings(self) -> dict[str, str]:
        return hccl.shown(os.environ)

    def why_unavailable(self) -> str | None:
        if find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        try:
            npu = _npu()
        except (ImportError, OSError) as error:
            return f"torch_npu cannot be imported ({error}); it needs CANN, or backend.software=true"
        return None if npu.is_available() else "torch_npu finds no NPU or driver"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def set_up(self, local_rank: int, local_world_size: int, threads: int) -> None:
        npu = _npu()
        if local_world_size > npu.device_count():
            shown = f"{local_world_size} local ranks, {npu.device_count()} NPU(s)"
            raise ConfigError(
                "launch.nproc_per_node", shown, "each local rank has an NPU of its own", "fewer ranks, or backend=cpu"
            )
        if threads:
            torch.set_num_threads(threads)
        npu.set_device(local_rank)
        # torch fills fresh memory with NaN where algorithms are to be deterministic; 910 writes no FP8.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def capabilities(self, local_rank: int) -> Capabilities:
        npu = _npu()
        able = ascend_soc.capabilities(npu.get_device_name(local_rank), npu.mem_get_info(local_rank)[1])
        # A stand-in answers for what the chip can do, not for how fast.
        return (
            replace(able, device_name=f"software NPU as {able.device_name}", peak_flops=None) if is_active() else able
        )

    def peak_memory_bytes(self) -> int:
        peak: int = _npu().max_memory_allocated()
        return peak


def _npu() -> Any:
    """`torch.npu`, which importing torch_npu brings."""
    if is_active():
        activate()
    import torch_npu

    return torch_npu.npu
