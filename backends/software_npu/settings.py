"""The variables that the software NPU reads, which acl/settings.h takes as they are written here. Torch-free.

| variable | is |
|---|---|
| SOFTWARE_NPU_SOC | the chip's name, which decides what torch_npu believes of it (Ascend950PR_9599) |
| SOFTWARE_NPU_DEVICES | devices (8) |
| SOFTWARE_NPU_MEMORY_MB | memory of a device (its share of the machine's) |
| SOFTWARE_NPU_ASYNC | 1: streams are worker threads; operators, copies and collectives run while the host goes on |
| SOFTWARE_NPU_DELAY_US | asynchronous: longest of the pauses of chance before a piece of work (0) |
| SOFTWARE_NPU_SEED | of those pauses (0) |
"""

import os
from collections.abc import Mapping

from octofold.backends.errors import UserError

DEVICES, MOST_DEVICES = 8, 1024
MOST = (1 << 31) - 1
SWITCH = {"0": "0", "false": "0", "1": "1", "true": "1"}


def canonical(given: Mapping[str, str]) -> dict[str, str]:
    """Every variable but the chip's name, as C++ reads it: numbers in digits, switches as 0 or 1.

    Args:
        given: the environment; what is empty there is not set.

    Raises:
        UserError: a variable holds something else.
    """
    machine_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    devices = _number(given, "DEVICES", DEVICES, 1, MOST_DEVICES)
    switch = given.get("SOFTWARE_NPU_ASYNC", "").strip().lower() or "0"
    if switch not in SWITCH:
        raise _refused("ASYNC", given, "1 (true) or 0 (false)", "1")
    return {
        "SOFTWARE_NPU_DEVICES": str(devices),
        "SOFTWARE_NPU_MEMORY_MB": str(_number(given, "MEMORY_MB", max(machine_mb // devices, 1), 1, MOST)),
        "SOFTWARE_NPU_ASYNC": SWITCH[switch],
        "SOFTWARE_NPU_DELAY_US": str(_number(given, "DELAY_US", 0, 0, MOST)),
        "SOFTWARE_NPU_SEED": str(_number(given, "SEED", 0, 0, MOST)),
    }


def _number(given: Mapping[str, str], name: str, otherwise: int, least: int, most: int) -> int:
    text = given.get(f"SOFTWARE_NPU_{name}", "").strip()
    if not text:
        return otherwise
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise _refused(name, given, f"a whole number from {least} to {most}", str(otherwise))
    return int(text)


def _refused(name: str, given: Mapping[str, str], rule: str, instead: str) -> UserError:
    variable = f"SOFTWARE_NPU_{name}"
    shown = f"{variable}={given[variable]}"
    return UserError(f"{shown}\n  rule:   {rule}\n  remedy: {variable}={instead}, or unset it")
