"""What the user may say about the device and the process group. Torch-free, so that a wrong key fails at once."""

from dataclasses import dataclass

from octofold.backends.errors import check_finite


@dataclass(frozen=True)
class BackendConfig:
    """The `backend` group."""

    name: str = "auto"
    """`auto` takes the first available of cuda and cpu; a name that cannot be honoured stops the run."""
    threads: int = 0
    """CPU threads a rank computes with; 0 divides the machine's cores among its local ranks."""
    timeout_s: float = 600.0
    """A collective that waits longer than this ends the run with an error."""
    peak_tflops_bf16: float = 0.0
    """Peak of the device for dense BF16 products in TFLOP/s, for MFU; 0: what is known of the device."""
    peak_tflops_fp8: float = 0.0
    """The same for FP8 products."""


def check(backend: BackendConfig) -> None:
    """Raise `ConfigError` for a number that no device has."""
    check_finite("backend.timeout_s", backend.timeout_s, least=1.0)
    for name in ("peak_tflops_bf16", "peak_tflops_fp8"):
        check_finite(f"backend.{name}", getattr(backend, name), least=0.0)
