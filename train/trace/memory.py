"""The bytes that storages of fake tensors would take on a device, as they are made, resized and let go."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

ALLOCATED_BYTES = 512
"""CUDA's and torch_npu's caching allocators round sizes up to multiples of this."""


class MemoryCount:
    """Adds up what is held on one kind of device."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.held_bytes = self.peak_bytes = 0
        self.phase, self.peak_phase = "setup", "setup"
        self._sizes: dict[int, int] = {}

    def enter(self, phase: str) -> None:
        """What is made from now on belongs to this phase, for people."""
        self.phase = phase

    def see(self, results: Any) -> None:
        """Count the storages of an operator's results that are new."""
        for tensor in tree_flatten(results)[0]:
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._track(tensor.untyped_storage())

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """FSDP2 frees and fills gathered weights by resizing their storage, which no operator tells of."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._release, key)

    def _set(self, key: int, size: int) -> None:
        rounded = -(-size // ALLOCATED_BYTES) * ALLOCATED_BYTES
        self.held_bytes += rounded - self._sizes[key]
        self._sizes[key] = rounded
        if self.held_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.held_bytes, self.phase

    def _release(self, key: int) -> None:
        self.held_bytes -= self._sizes.pop(key)
