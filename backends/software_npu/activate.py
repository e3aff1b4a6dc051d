"""Puts the software NPU under torch_npu in a process: the environment it needs (settings.py), and its libraries."""

import atexit
import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from octofold.backends.software_npu.build import ACL, HCCL, OPERATORS
from octofold.backends.software_npu.settings import canonical

FOLDER = "OCTOFOLD_SOFTWARE_NPU"
"""Variable that holds the folder of the libraries in a process that runs on them."""

_libraries: list[Any] = []
"""Of the operators of this process; kernels stay registered as long as it lives."""


def environment(folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that is to run on the software NPU.

    Args:
        folder: where `build` put the libraries.
        given: the environment it will be added to, whose own settings stay.

    Raises:
        UserError: see `canonical`.
    """
    added = {
        FOLDER: str(folder),
        # torch would import torch_npu by itself, before the libraries are there.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        **canonical(given),
    }
    if added["SOFTWARE_NPU_ASYNC"] == "0":
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
    from octofold.backends.software_npu.reference_ops.install import KERNELS, install

    _libraries.append(install())
    torch.ops.octofold_software_npu.install(list(KERNELS))
    atexit.register(torch.ops.octofold_software_npu.end_python)
