"""Variables that a node's agent sets for its ranks where the user has set none, each with its reason. Torch-free."""

import os
from collections.abc import Mapping
from pathlib import Path

from octofold.backends import hccl
from octofold.launch.config import JobConfig
from octofold.launch.ports import hccl_port, split_ports
from octofold.launch.submission import Setting

NVIDIA_DEVICE = Path("/dev/nvidiactl")
ASCEND_DEVICE = Path("/dev/davinci_manager")

HOST_RANGE = "HCCL_HOST_SOCKET_PORT_RANGE"
"""Counts before HCCL_IF_BASE_PORT, where a user has set it (CANN 9.0, HCCL's variables, hcclenvref_07_0020). It and
HCCL_NPU_SOCKET_PORT_RANGE are for several processes on one NPU, which Octofold never has, and A2 refuses them beside
fused operators (MC2): neither is set here."""

_REACHES = "the interface by which this node reaches the first"


def settings(
    backend: str, interface: str | None, environ: Mapping[str, str], ports: str | None = None
) -> tuple[Setting, ...]:
    """What is set on a node of several. What concerns one machine, or HCCL's groups, the backend sets itself.

    Args:
        backend: `backend.name`; auto is told by the devices here.
        interface: that leads to the first node; None where it cannot be told.
        environ: what stands here is left alone.
        ports: `launch.ports`.
    """
    backend = backend_here(backend)
    wanted = [*_of_gloo(interface)]
    wanted += _of_nccl(interface) if backend == "cuda" else _of_hccl(interface) if backend == "ascend" else []
    if ports and backend == "ascend" and HOST_RANGE not in environ:
        wanted.append(_base_port(ports))
    return tuple(setting for setting in wanted if setting.name not in environ)


def backend_here(name: str) -> str:
    """`backend.name`, where auto is told by the devices of this machine."""
    if name != "auto":
        return name
    found = {"ascend": ASCEND_DEVICE, "cuda": NVIDIA_DEVICE}
    return next((backend for backend, device in found.items() if device.exists()), "cpu")


def foreseen(config: JobConfig) -> tuple[Setting, ...]:
    """What the nodes of a job will set, as far as it can be told before they start; INTERFACE is each node's own."""
    launch = config.launch
    # Pods have an environment of their own; Slurm and a local agent hand this one on.
    given = ({} if launch.name == "kubernetes" else dict(os.environ)) | launch.environment
    backend = config.backend.name
    found = [*settings(backend, "INTERFACE" if launch.nodes > 1 else None, given, launch.ports)]
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


def _base_port(ports: str) -> Setting:
    first = hccl_port(ports)
    why = f"HCCL's processes meet at {first} to {split_ports(ports)[-1]}, the last of launch.ports; else from 60000 on"
    return Setting("HCCL_IF_BASE_PORT", str(first), why)
