"""Checksums of files in blocks: taken while a file is written, and held against what is read. Torch-free.

A block has a checksum of its own, so that a rank which reads a part of a file checks that part and reads little more.
They find what disks, memory and networks spoil by accident; they are no signature.
"""

from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from octofold.backends.errors import UserError
from octofold.train.checkpoint.folders import Folder, Reader
from octofold.train.checkpoint.patience import GONE, WAITS_S, patiently

BLOCK_BYTES = 4 * 2**20
"""Of what is written now, behind a file's header, which is a block of its own; the last block is shorter."""
REMEDY = "\n  remedy: resume from an earlier checkpoint of the run"


class DamagedError(UserError):
    """A checkpoint, or a file of one, is not what was written."""


class IncompleteError(DamagedError):
    """A checkpoint was begun and never published."""


class UnreadableError(DamagedError):
    """A checkpoint cannot be read now, for all the tries. What was written may be whole."""

    status = 1


def unreadable(place: object, error: OSError) -> str:
    """What it means to the user that a place fails whenever it is read."""
    if isinstance(error, PermissionError):
        rule, remedy = "what a run continues from must be readable", "mend permissions or credentials, then start again"
        return f"{place} cannot be read: {error.strerror or error}\n  rule:   {rule}\n  remedy: {remedy}"
    return (
        f"{place} cannot be read: {error.strerror or error}\n  rule:   disks and stores may fail for a moment, but "
        f"this one failed {1 + len(WAITS_S)} times\n  remedy: start again once it can be read; nothing was removed"
    )


def checksum(data: "bytes | memoryview") -> str:
    """XXH3 of 64 bits, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True)
class FileRecord:
    """A file of tensors as it was written."""

    nbytes: int
    header_bytes: int = 0
    """How much of it is its header, the first block."""
    blocks: list[str] | None = None
    """The checksum of each block; None where none were taken (format 1)."""
    block_bytes: int = BLOCK_BYTES

    def bounds(self, number: int) -> tuple[int, int]:
        """First byte of a block, and the byte behind its last."""
        begin = 0 if number == 0 else self.header_bytes + (number - 1) * self.block_bytes
        return begin, min(self.header_bytes + number * self.block_bytes, self.nbytes)

    def block_of(self, place: int) -> int:
        """The block in which a byte lies."""
        return 0 if place < self.header_bytes else 1 + (place - self.header_bytes) // self.block_bytes

    @property
    def count(self) -> int:
        """How many blocks it has."""
        return 1 + -(-(self.nbytes - self.header_bytes) // self.block_bytes)


class BlockSums:
    """Checksums of the blocks of what is written piece by piece."""

    def __init__(self, header_bytes: int) -> None:
        self._header_bytes = header_bytes
        self.nbytes = 0
        self._done: list[str] = []
        self._open = xxhash.xxh3_64()
        self._room = header_bytes

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while data:
            piece, data = data[: self._room], data[self._room :]
            self._open.update(piece)
            self.nbytes += len(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._done.append(self._open.hexdigest())
                self._open.reset()
                self._room = BLOCK_BYTES

    def record(self) -> FileRecord:
        """Of the file, now that it is complete."""
        unfinished = [self._open.hexdigest()] if self._room < BLOCK_BYTES else []
        return FileRecord(self.nbytes, self._header_bytes, [*self._done, *unfinished], BLOCK_BYTES)


def record_of(folder: Folder, name: str) -> FileRecord:
    """Of a safetensors file that is there, read once from end to end.

    Raises:
        OSError: it cannot be read.
    """
    buffer, reader = memoryview(bytearray(BLOCK_BYTES)), folder.open(name)
    try:
        got = reader.read_into(buffer[:8], 0)
        sums = BlockSums(8 + int.from_bytes(buffer[:got], "little"))
        while got := reader.read_into(buffer, sums.nbytes):
            sums.update(buffer[:got])
    finally:
        reader.close()
    return sums.record()


class CheckedFile:
    """A file of a checkpoint whose blocks are held to their checksums whenever they are read. A context.

    Raises:
        DamagedError: (from any method) the file is gone, ends early, or a block is not what was written.
        UnreadableError: (from any method) the disk or the store does not give it.
    """

    def __init__(self, folder: Folder, name: str, record: FileRecord, alive: Callable[[], None] = lambda: None) -> None:
        """`alive`: called after each piece."""
        self.folder, self.name, self.record, self._alive = folder, name, record, alive
        self.checked: set[int] = set()
        """Blocks that have been read and are as they were written."""
        self._reader: Reader | None = None
        self._buffer = memoryview(b"")
        self._held: int | None = None

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def read(self, begin: int, size: int) -> bytes:
        """So many bytes from `begin` on."""
        out = bytearray(size)
        self.read_into(memoryview(out), begin)
        return bytes(out)

    def read_into(self, out: memoryview, begin: int) -> None:
        """Fill `out` with the bytes from `begin` on. A block that `out` takes whole is read straight into it."""
        if begin + len(out) > self.record.nbytes:
            raise self._damaged(f"it holds {self.record.nbytes} bytes, and its header says more")
        while out:
            number = self.record.block_of(begin)
            first, last = self.record.bounds(number)
            taken = min(last - begin, len(out))
            if taken == last - first:
                self._fill(number, out[:taken])
            else:
                out[:taken] = self._block(number)[begin - first : begin - first + taken]
            out, begin = out[taken:], begin + taken

    def check(self, number: int) -> None:
        """Read a block for its checksum's sake alone."""
        self._block(number)

    def _block(self, number: int) -> memoryview:
        first, last = self.record.bounds(number)
        if self._held != number:
            if len(self._buffer) < last - first:
                self._buffer = memoryview(bytearray(last - first))
            self._held = None
            self._fill(number, self._buffer[: last - first])
            self._held = number
        return self._buffer[: last - first]

    def _fill(self, number: int, out: memoryview) -> None:
        first, last = self.record.bounds(number)
        try:
            got = patiently(lambda: self._read(out, first))
        except GONE as error:
            raise self._damaged(str(error.strerror or error)) from None
        except OSError as error:
            raise UnreadableError(unreadable(f"{self.folder}/{self.name}", error)) from None
        self._alive()
        if got < len(out):
            raise self._damaged(f"it ends at byte {first + got}, and {self.record.nbytes} were written")
        if self.record.blocks is not None and checksum(out) != self.record.blocks[number]:
            raise self._damaged(f"bytes {first} to {last - 1} are not those that were written")
        self.checked.add(number)

    def _read(self, out: memoryview, begin: int) -> int:
        try:
            if self._reader is None:
                self._reader = self.folder.open(self.name)
            return self._reader.read_into(out, begin)
        except OSError:
            self.__exit__()  # what was opened on a server that has gone stays broken
            raise

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(f"{self.folder}/{self.name} cannot be read: {reason}{REMEDY}")
