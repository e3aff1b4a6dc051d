"""`launch.ports`: where a job listens for its other nodes. Torch-free.

The nodes of a job must know where they meet before they have met, so that port follows from the range alone. The ranks'
store goes to any port of the range that is free: the last, or one before it, for the first ones are where jobs meet.
"""

import re

from octofold.backends.errors import ConfigError
from octofold.launch.doctor_matrix import HCCL_PORTS

LEAST = 2
"""One where nodes meet, and one where ranks do."""
FIRST_FREE = 1024
"""Below it only root may listen."""
KEY = "launch.ports"
EXAMPLE = f"{KEY}=29400-29463"


def split_ports(text: str) -> range:
    """The ports of FIRST-LAST.

    Raises:
        ConfigError: it is no such range.
    """
    found = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or not first <= last < 65536:
        raise ConfigError(KEY, text, "FIRST-LAST, two ports of which the second is not smaller", EXAMPLE)
    if first < FIRST_FREE:
        raise ConfigError(KEY, text, f"ports that a user may open, {FIRST_FREE} to 65535", EXAMPLE)
    return range(first, last + 1)


def own_ports(text: str, backend: str) -> range:
    """Those of the range that Octofold itself listens at; on Ascend the rest are HCCL's.

    Args:
        text: `launch.ports`.
        backend: `backend.name`; where it is auto, HCCL is left none.

    Raises:
        ConfigError: there are too few.
    """
    ports = split_ports(text)
    kept = HCCL_PORTS if backend == "ascend" else 0
    if len(ports) < LEAST + kept:
        of_hccl = f", and on Ascend the last {kept} are HCCL's, however many ranks a node has" if kept else ""
        rule = f"{LEAST + kept} ports at least: one where nodes meet, one where ranks do{of_hccl}"
        first = min(ports[0], 65536 - LEAST - kept)
        raise ConfigError(KEY, text, rule, f"{KEY}={first}-{first + LEAST + kept - 1}")
    return ports[: len(ports) - kept]


def hccl_port(text: str) -> int:
    """The first of those that are left to HCCL."""
    return split_ports(text)[-HCCL_PORTS]


def meeting_port(ports: range, job: int = 0) -> int:
    """Where the nodes of a job meet: the first, or by the number of the job one of the first half."""
    return ports[job % ((len(ports) + 1) // 2)]
