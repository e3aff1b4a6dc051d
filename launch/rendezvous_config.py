"""How the agents of several nodes find each other. Torch-free."""

import re
from dataclasses import dataclass

from octofold.backends.errors import ConfigError

BACKENDS = ("c10d", "static")
DEFAULT_PORT = 29400
"""torchrun's."""


@dataclass(frozen=True)
class RendezvousConfig:
    """The keys `launch.rendezvous.*`."""

    backend: str = "c10d"
    """c10d: nodes meet again after a failure, a node that comes instead of a lost one included. static: each node keeps
    the number it was given, and a lost node ends the job."""
    endpoint: str | None = None
    """HOST:PORT where the first node listens; null: what Slurm or Kubernetes tells, else the first of launch.hosts.
    Without a port: the first of launch.ports, else 29400."""
    node_rank: int | None = None
    """This node's number; null: what Slurm or Kubernetes tells, else its place in launch.hosts."""
    id: str | None = None
    """Tells jobs apart that meet at one endpoint; null: the scheduler's id of the job, else the run folder."""
    timeout_s: float = 600.0
    """How long nodes wait for each other, at the start and after a failure."""
    last_call_s: float = 60.0
    """With launch.min_nodes: how long they wait for the others once so many have met."""
    lost_after_s: float = 30.0
    """A node that has been silent for so long is lost: ranks end, and the others wait for it, or another, to come."""


def check_rendezvous(config: RendezvousConfig, nodes: int) -> None:
    """Raise `ConfigError` for values that name no meeting."""
    if config.backend not in BACKENDS:
        raise ConfigError("launch.rendezvous.backend", config.backend, f"one of {', '.join(BACKENDS)}", "c10d")
    if config.endpoint is not None:
        split_endpoint(config.endpoint)
    if config.node_rank is not None and not 0 <= config.node_rank < nodes:
        rule = f"nodes are numbered from 0 to launch.nodes - 1 = {nodes - 1}"
        raise ConfigError("launch.rendezvous.node_rank", config.node_rank, rule, "the number of this node")
    if config.id == "":
        raise ConfigError("launch.rendezvous.id", "''", "a text, or null", "launch.rendezvous.id=null")
    for key in ("timeout_s", "lost_after_s", "last_call_s"):
        if not 1 <= getattr(config, key) < float("inf"):
            raise ConfigError(f"launch.rendezvous.{key}", getattr(config, key), "seconds, one or more", "30")


def split_endpoint(endpoint: str, default: int = DEFAULT_PORT) -> tuple[str, int]:
    """Host and port of HOST:PORT, HOST or [IPv6]:PORT.

    Args:
        default: the port where none is given.

    Raises:
        ConfigError: it is none of them.
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]+))(?::(\d{1,5}))?", endpoint)
    port = int(found[3] or default) if found else 0
    if not found or not 0 < port < 65536:
        rule = "HOST:PORT, with a port from 1 to 65535; an IPv6 address in [ ]"
        raise ConfigError("launch.rendezvous.endpoint", endpoint, rule, f"node1:{DEFAULT_PORT}")
    return found[1] or found[2], port
