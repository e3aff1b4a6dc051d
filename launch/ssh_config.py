"""How `octofold launch launch=torchrun` reaches the hosts. Torch-free."""

import re
from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError


@dataclass(frozen=True)
class SshConfig:
    """The keys `launch.ssh.*`."""

    enabled: bool = False
    """Start the agent of each of launch.hosts over ssh, and stay until all have ended."""
    user: str | None = None
    """Name to log in with; null: ssh's own choice."""
    options: list[str] = field(default_factory=list)
    """Further arguments of ssh, such as [-p,2222,-i,/path/key]."""
    directory: str | None = None
    """Working directory on every host; null: this one."""
    program: list[str] = field(default_factory=list)
    """The command that is octofold there, such as [/opt/octofold/bin/octofold]; []: the interpreter of this process."""


def check_ssh(config: SshConfig, hosts: list[str]) -> None:
    """Raise `ConfigError` for what ssh would misunderstand."""
    if config.enabled and not hosts:
        raise ConfigError("launch.ssh.enabled", "true", "ssh needs names", "launch.hosts=[node1,node2]")
    if config.directory is not None and not config.directory.startswith("/"):
        rule = "a path that means the same on every host; ~ is not expanded"
        raise ConfigError("launch.ssh.directory", config.directory, rule, "an absolute path")
    if config.user is not None and not re.fullmatch(r"(?!-)[^\s@\0]+", config.user):
        raise ConfigError("launch.ssh.user", config.user, "a user's name", "launch.ssh.user=null")
