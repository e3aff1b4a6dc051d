"""What the user may say about the device and the process group. Torch-free, so that a wrong key fails at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BackendConfig:
    """The `backend` group."""

    name: str = "auto"
    """`auto` takes the first available of cuda and cpu; a name that cannot be honoured stops the run."""
    threads: int = 0
    """CPU threads a rank computes with; 0 divides the machine's cores among its local ranks."""
    timeout_s: float = 600.0
    """A collective that waits longer than this ends the run with an error."""
