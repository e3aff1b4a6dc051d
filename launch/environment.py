"""Variables that a node's agent sets for its ranks where the user has set none, each with its reason. Torch-free."""

import os
from collections.abc import Mapping
from pathlib import Path

from octofold.backends import hccl
from octofold.launch.config import JobConfig
from octofold.launch.submission import Setting

NVIDIA_DEVICE = Path("/dev/nvidiactl")
ASCEND_DEVICE = Path("/dev/davinci_manager")

_REACHES = "the interface by which this node reaches the first"


def settings(backend: str, interface: str | None, environ: Mapping[str, str]) -> tuple[Setting, ...]:
    """What is set on a node of several. What concerns one machine, or HCCL's groups, the backend sets itself.

    Args:
        backend: `backend.name`; auto is told by the devices here.
        interface: that leads to the first node; None where it cannot be told.
        environ: what stands here is left alone.
    """
    if backend == "auto":
        found = {"ascend": ASCEND_DEVICE, "cuda": NVIDIA_DEVICE}
        backend = next((name for name, device in found.items() if device.exists()), "cpu")
    wanted = [*_of_gloo(interface)]
    wanted += _of_nccl(interface) if backend == "cuda" else _of_hccl(interface) if backend == "ascend" else []
    return tuple(setting for setting in wanted if setting.name not in environ)


def foreseen(config: JobConfig) -> tuple[Setting, ...]:
    """What the nodes of a job will set, as far as it can be told before they start; INTERFACE is each node's own."""
    launch = config.launch
    # Pods have an environment of their own; Slurm and a local agent hand this one on.
    given = ({} if launch.name == "kubernetes" else dict(os.environ)) | launch.environment
    backend = config.backend.name
    found = [*settings(backend, "INTERFACE" if launch.nodes > 1 else None, given)]
    if backend == "ascend":
        told = hccl.variables(config.backend, given, deterministic=config.train.deterministic)
        found += [Setting(name, value, "as the backend's keys say (docs/ascend.md)") for name, value in told.items()]
    if "OMP_NUM_THREADS" not in given:
        cores = f"CORES/{launch.nproc_per_node}" if launch.nproc_per_node > 1 else "CORES"
        found.append(Setting("OMP_NUM_THREADS", cores, "every rank would take all cores of its node"))
    return (*found, *(Setting(name, value, "launch.environment") for name, value in launch.environment.items()))


def _of_gloo(interface: str | None) -> list[Setting]:
    why = f"{_REACHES}; gloo otherwise takes the address of the host's name, often loopback"
    return [Setting("GLOO_SOCKET_IFNAME", interface, why)] if interface else []


def _of_nccl(interface: str | None) -> list[Setting]:
    level = Setting("NCCL_DEBUG", "WARN", "NCCL keeps the reason of a failed connection to itself otherwise")
    # With = the whole name counts; NCCL otherwise takes every interface whose name begins so.
    why = f"{_REACHES}; NCCL's ranks meet there (data goes over RDMA devices where there are any)"
    return [level, Setting("NCCL_SOCKET_IFNAME", f"={interface}", why)] if interface else [level]


def _of_hccl(interface: str | None) -> list[Setting]:
    white = Setting("HCCL_WHITELIST_DISABLE", "1", "HCCL otherwise admits only hosts of a list that nobody wrote")
    why = f"{_REACHES}; HCCL's ranks meet there (data goes over the devices' own links)"
    return [white, Setting("HCCL_SOCKET_IFNAME", f"={interface}", why)] if interface else [white]
