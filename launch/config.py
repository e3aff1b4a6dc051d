"""The whole job as the command line sees it: a run and how its ranks are started. Torch-free."""

from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError
from octofold.train.config import RunConfig


@dataclass(frozen=True)
class LaunchConfig:
    """The `launch` group."""

    name: str = "local"
    nproc_per_node: int = 1
    """Ranks to start on this machine; ignored where a launcher has already started them."""
    stop_deadline_s: float = 30.0
    """Ranks save and end within this after Ctrl-C, SIGTERM or SIGUSR1; those that do not are killed."""
    max_restarts: int = 3
    """How often ranks are started again when one of them has failed, to go on from the newest valid checkpoint. Ranks
    that a launcher has started are its own to restart (torchrun --max-restarts)."""


@dataclass(frozen=True)
class JobConfig(RunConfig):
    """`RunConfig` with the launcher beside it."""

    resume_allow: list[str] = field(default_factory=list)
    """Keys, with * and ?, by which a continued run may leave the course of the saved one (launch/changes.py)."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def check(launch: LaunchConfig) -> None:
    """Raise `ConfigError` for a launcher that cannot be honoured."""
    if launch.name != "local":
        raise ConfigError("launch.name", launch.name, "this version starts local ranks", "launch=local")
    if launch.nproc_per_node < 1:
        raise ConfigError(
            "launch.nproc_per_node", launch.nproc_per_node, "at least one rank", "launch.nproc_per_node=1"
        )
    if not 0 <= launch.stop_deadline_s < float("inf"):
        raise ConfigError("launch.stop_deadline_s", launch.stop_deadline_s, "a number of seconds", "30")
    if launch.max_restarts < 0:
        raise ConfigError("launch.max_restarts", launch.max_restarts, "a count", "launch.max_restarts=0 for none")
