"""What HCCL and torch_npu's process groups find in the environment. What the user has set there stays. Torch-free.

By themselves they do not fit together: HCCL waits 1836 s for a peer where backend.timeout_s is 600, and 120 s for one
that has yet to connect, and torch_npu's watchdog, which tells less than HCCL, would end the job first.
"""

import math
from collections.abc import Mapping
from datetime import timedelta

from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError

CONNECT_TIMEOUT_S = (120, 7200)
"""What HCCL_CONNECT_TIMEOUT may be."""
WATCHDOG_GRACE_S = 60
"""How long torch_npu's watchdog leaves HCCL to say, by itself, which peer it waited for."""
SAME_BITS = ("true", "strict")
"""Values of HCCL_DETERMINISTIC, in any case, by which sums come out alike."""
PREFIXES = ("HCCL_", "P2P_HCCL_", "TORCH_HCCL_")


def variables(config: BackendConfig, given: Mapping[str, str], *, deterministic: bool) -> dict[str, str]:
    """What is to be added to the environment before the first group is made.

    Args:
        given: the environment.
        deterministic: sums come out alike to the last bit whenever they are taken.

    Raises:
        ConfigError: backend.hccl_buffer_mb and HCCL_BUFFSIZE, or train.deterministic and HCCL_DETERMINISTIC, differ.
    """
    wait_s = math.ceil(config.timeout_s)
    least_s, most_s = CONNECT_TIMEOUT_S
    # A group connects when it is first used, for which a rank may be as late as for any call.
    wanted = {"HCCL_EXEC_TIMEOUT": wait_s, "HCCL_CONNECT_TIMEOUT": min(max(wait_s, least_s), most_s)}
    added = {name: str(number) for name, number in wanted.items()}
    if deterministic:
        added["HCCL_DETERMINISTIC"] = "true"
        said = given.get("HCCL_DETERMINISTIC", "true")
        if said.lower() not in SAME_BITS:
            # torch_npu would tell each group otherwise, whatever HCCL reads there.
            shown = f"train.deterministic=true HCCL_DETERMINISTIC={said}"
            remedy = "unset HCCL_DETERMINISTIC, or train.deterministic=false"
            raise ConfigError("train.deterministic", shown, "both say the same", remedy)
    if config.hccl_buffer_mb:
        added["HCCL_BUFFSIZE"] = str(config.hccl_buffer_mb)
        said = given.get("HCCL_BUFFSIZE", added["HCCL_BUFFSIZE"])
        if said != added["HCCL_BUFFSIZE"]:
            shown = f"backend.hccl_buffer_mb={config.hccl_buffer_mb} HCCL_BUFFSIZE={said}"
            raise ConfigError("backend.hccl_buffer_mb", shown, "both say the same", "unset HCCL_BUFFSIZE")
    return {name: value for name, value in added.items() if name not in given}


def watchdog_timeout(config: BackendConfig, environ: Mapping[str, str]) -> timedelta:
    """That of process groups, which is to be longer than HCCL's own (which 0 lifts)."""
    said = environ.get("HCCL_EXEC_TIMEOUT", "")
    hccl_s = int(said) if said.isdigit() else 0
    return timedelta(seconds=hccl_s + WATCHDOG_GRACE_S if hccl_s else config.timeout_s)


def shown(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set, whoever set them, by name."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(PREFIXES)}
