"""What this process may use of its machine: cores and memory, containers' limits included. Torch-free."""

import os
from pathlib import Path

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
