"""Puts the software NPU under torch_npu in a process: the environment it needs, and its libraries.

| variable | is |
|---|---|
| SOFTWARE_NPU_SOC | the chip's name, which decides what torch_npu believes of it (Ascend950PR_9599) |
| SOFTWARE_NPU_DEVICES | devices (8) |
| SOFTWARE_NPU_MEMORY_MB | memory of a device (its share of the machine's) |
| SOFTWARE_NPU_ASYNC | 1: streams are worker threads, and collectives and copies run while the host goes on |
| SOFTWARE_NPU_DELAY_US | asynchronous: longest of the pauses of chance before a piece of work (0) |
| SOFTWARE_NPU_SEED | of those pauses (0) |
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from octofold.backends.software_npu.build import ACL, HCCL, OPERATORS

FOLDER = "OCTOFOLD_SOFTWARE_NPU"
"""Variable that holds the folder of the libraries in a process that runs on them."""
DEVICES = 8

_libraries: list[Any] = []
"""Of the operators of this process; kernels stay registered as long as it lives."""


def environment(folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that is to run on the software NPU.

    Args:
        folder: where `build` put the libraries.
        given: the environment it will be added to, whose own settings stay.
    """
    devices = int(given.get("SOFTWARE_NPU_DEVICES", DEVICES))
    machine_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    added = {
        FOLDER: str(folder),
        # torch would import torch_npu by itself, before the libraries are there.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "SOFTWARE_NPU_DEVICES": str(devices),
        "SOFTWARE_NPU_MEMORY_MB": given.get("SOFTWARE_NPU_MEMORY_MB", str(machine_mb // devices)),
    }
    if given.get("SOFTWARE_NPU_ASYNC", "0") == "0":
        # Operators run in the call; those that torch_npu would queue in a thread of its own must not overtake them.
        added["TASK_QUEUE_ENABLE"] = "0"
    return added


def is_active(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a process with this environment was started to run on the software NPU."""
    return FOLDER in environ


def activate() -> None:
    """Load the libraries and torch_npu, and put the CPU's kernels under its operators. Once in a process.

    The process must have been started with `environment`.
    """
    if _libraries:
        return
    assert is_active(), f"{FOLDER} is not set"
    assert "torch_npu" not in sys.modules, "torch_npu is imported already"
    folder = Path(os.environ[FOLDER])
    others = sorted(path.name for path in folder.glob("lib*.so") if path.name not in (ACL, HCCL))
    for name in (ACL, HCCL, *others):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    import torch

    # It prints that there is no CANN, and programs read what a verb prints.
    with redirect_stdout(sys.stderr):
        import torch_npu  # noqa: F401

    torch.ops.load_library(str(folder / OPERATORS))
    torch.ops.octofold_software_npu.install()
    from octofold.backends.software_npu.reference_ops.install import install

    _libraries.append(install())
