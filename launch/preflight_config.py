"""What the nodes of a job are asked before its first step. Torch-free."""

from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError

MEASURED = ("node", "supernode", "network")
"""Classes of links that are timed (`octofold.backends.topology`)."""


@dataclass(frozen=True)
class PreflightConfig:
    """The keys `launch.preflight.*`; for jobs of several nodes."""

    doctor: bool = True
    """Every node examines itself as `octofold doctor` does; what fails there stops the job."""
    links: bool = True
    """Collectives inside and across nodes are timed on every rank; a node far slower than the others is named."""
    message_mib: int = 16
    """Size of a message, a rank."""
    slow_factor: float = 4.0
    """A node whose links take so many times as long as is usual among them is slow."""
    least_gb_s: dict[str, float] = field(default_factory=dict)
    """What a rank sends a second at least, in 10^9 bytes, inside a node, and to one of the same supernode or beyond:
    {node: 100, network: 20}. Less is slow, even where all links are alike."""
    stop_on_slow: bool = True
    """A slow node stops the job; otherwise it is only named."""


def check_preflight(config: PreflightConfig) -> None:
    """Raise `ConfigError` for what measures nothing."""
    if not 1 <= config.message_mib <= 1024:
        raise ConfigError("launch.preflight.message_mib", config.message_mib, "1 to 1024 MiB", "16")
    for link, least in config.least_gb_s.items():
        if link not in MEASURED or not 0 <= least < float("inf"):
            rule = f"classes of links ({', '.join(MEASURED)}), and 10^9 bytes a second"
            raise ConfigError("launch.preflight.least_gb_s", f"{link}: {least}", rule, "{node: 100, network: 20}")
    if not 1 < config.slow_factor < float("inf"):
        raise ConfigError("launch.preflight.slow_factor", config.slow_factor, "a number above 1", "4")
