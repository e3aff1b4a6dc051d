"""The device a rank computes on: what every backend answers, and what it says of its abilities. Torch-free."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from octofold.backends.config import BackendConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Capabilities:
    """What the device can do, read from the device itself and never from the vendor's name."""

    device_name: str
    bf16: bool
    """Products of BF16 operands run natively."""
    fp8: bool
    """Products of FP8 operands run natively."""
    memory_bytes: int
    mxfp8: bool = False
    """Products scale their operands' tiles of 32 natively."""
    peak_flops: dict[str, float] | None = None
    """Dense products, operations a second, by the arithmetic they run on: bf16, fp8; None where nobody has told."""
    int8: bool = False
    """Products of INT8 operands run natively."""
    hif8: bool = False
    """Products of HiFloat8 operands run natively."""
    casts_fp8: bool = True
    """Operators read and write tensors of FP8 dtypes; elsewhere only providers made for that do, byte by byte."""

    def native(self) -> list[str]:
        """Names of the arithmetic that products run natively in, besides FP32."""
        kinds = {"BF16": self.bf16, "INT8": self.int8, "FP8": self.fp8, "MXFP8": self.mxfp8, "HiF8": self.hif8}
        return [name for name, has in kinds.items() if has]


class Backend(ABC):
    """One kind of device and the collective library its ranks talk through. Holds no state."""

    name: str
    collective_library: str
    """Its name for people."""
    deterministic: bool = False
    """torch's switch gives the same bits every time; elsewhere that takes more, which is left to the user."""

    def prepare_groups(self, config: BackendConfig) -> timedelta:
        """Tell the collective library what it reads when groups are made; the timeout of a call on them.

        Raises:
            ConfigError: the environment says otherwise.
        """
        return timedelta(seconds=config.timeout_s)

    def group_settings(self) -> dict[str, str]:
        """What the collective library has been told, for people, by name."""
        return {}

    def process_groups(self) -> str:
        """What `torch.distributed.init_process_group` is told: the library, or what this backend has registered."""
        return self.collective_library

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """None where the backend can run here, else the reason."""

    @abstractmethod
    def device(self, local_rank: int) -> "torch.device":
        """The device of a local rank."""

    @abstractmethod
    def set_up(self, local_rank: int, local_world_size: int, threads: int) -> None:
        """Make the calling process use its device. `threads`: CPU threads a rank; 0 divides the cores."""

    @abstractmethod
    def capabilities(self, local_rank: int) -> Capabilities:
        """Read from the device."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The most memory this process has held on its device."""
