"""safetensors files piece by piece, for conversions that must not hold a whole tensor.

The library's reader maps files, whose pages then count as the process's memory, and its writer wants every tensor at
once. The format is small: 8 bytes of header length, a JSON header with dtype, shape and place of each tensor, the data.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from octofold.backends.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LONGEST_HEADER_BYTES = 100_000_000
"""The library's own limit."""
SLAB_BYTES = 8 * 2**20
"""How much of a tensor a conversion holds at once."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, unread."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    begin: int
    """Place of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: `slabs` yields pieces whose bytes, one after the other, are the tensor's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its free-text metadata.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
    try:
        with path.open("rb") as file:

            def read(begin: int, size: int) -> bytes:
                file.seek(begin)
                return file.read(size)

            return parse_header(path, os.fstat(file.fileno()).st_size, read)
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None


def parse_header(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """`read_header` of a file that is not opened here.

    Args:
        path: for the errors, and for `StoredTensor`.
        size: of the file, in bytes.
        read: gives so many bytes from some place on.
    """
    header_bytes = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or header_bytes > min(size - 8, LONGEST_HEADER_BYTES):
        raise _damaged(path, f"a header of {header_bytes} bytes does not fit a file of {size} bytes")
    try:
        header = json.loads(read(8, header_bytes))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = header.pop(METADATA, {})
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _place(path, *item)):
        tensor, tensor_end = _entry(path, name, entry, 8 + header_bytes)
        if tensor.begin != 8 + header_bytes + end:
            raise _damaged(path, f"{name} does not begin where the tensor before it ends")
        tensors[name], end = tensor, tensor_end
    if 8 + header_bytes + end != size:
        raise _damaged(path, f"it holds {size} bytes, and its header describes {8 + header_bytes + end}")
    return tensors, metadata


def _place(path: Path, name: str, entry: object) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]  # type: ignore[index]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"its header says nothing of where {name} lies") from None


def _entry(path: Path, name: str, entry: dict[str, object], data_begin: int) -> tuple[StoredTensor, int]:
    begin, end = _place(path, name, entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in DTYPES:
        raise _damaged(path, f"{name} has the dtype {dtype}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise _damaged(path, f"{name} has the shape {shape}")
    tensor = StoredTensor(name, DTYPES[str(dtype)], tuple(shape), path, data_begin + begin)
    if tensor.nbytes != end - begin:
        raise _damaged(path, f"{name} needs {tensor.nbytes} bytes and has {end - begin}")
    return tensor, end


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read: {reason}\n  remedy: fetch or write the file again")


def read_rows(tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
    """tensor[first:last] along dim 0, read into memory of its own.

    Raises:
        UserError: the file is shorter than its header says.
    """
    assert 0 <= first <= last <= tensor.shape[0]
    row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
    raw = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
    view, place = raw.numpy().data, tensor.begin + first * row_bytes
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY)
    except OSError as error:
        raise _damaged(tensor.path, str(error.strerror)) from None
    try:
        while view:
            got = os.preadv(descriptor, [view], place)
            if got == 0:
                raise _damaged(tensor.path, f"it ends inside {tensor.name}")
            view, place = view[got:], place + got
    finally:
        os.close(descriptor)
    return raw.view(tensor.dtype).view(last - first, *tensor.shape[1:])


def slabs_of(rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Windows of rows that cover `rows`, each of about `SLAB_BYTES` and, but for the last, a multiple of `multiple`."""
    step = max(SLAB_BYTES // max(row_bytes, 1) // multiple, 1) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def write_file(path: Path, tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> None:
    """Write the tensors in their order, one slab at a time, and flush the file to the disk.

    Raises:
        OSError: the disk is full or cannot be written; what was written so far is left to the caller.
    """
    header: dict[str, object] = {METADATA: metadata}
    end = 0
    for tensor in tensors:
        place = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with path.open("wb") as file:
        file.write(len(document).to_bytes(8, "little") + document)
        for tensor in tensors:
            begin = file.tell()
            for slab in tensor.slabs():
                assert slab.dtype == tensor.dtype, (tensor.name, slab.dtype)
                file.write(slab.contiguous().flatten().view(torch.uint8).numpy().data)
            assert file.tell() - begin == tensor.nbytes, tensor.name
        file.flush()
        os.fsync(file.fileno())
