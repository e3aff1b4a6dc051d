"""Where files of checkpoints lie: a folder on a disk, or one behind a URL that fsspec knows. Torch-free.

A folder on a disk is published by renaming. An object store renames nothing: there a checkpoint is published by the
manifest, which is written last. Both are one interface here; whatever goes wrong is an OSError.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from octofold.backends.errors import UserError
from octofold.train.checkpoint.exchange import exchange


class Reader(Protocol):
    """A file open for reading at any place."""

    def read_into(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin` on; fewer only where the file ends. Returns how many."""

    def close(self) -> None:
        """Let go of it."""


class Folder(ABC):
    """A folder; `str` gives the path or URL that `folder_at` makes it from again."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of its path."""

    @property
    @abstractmethod
    def parent(self) -> "Folder":
        """The folder that holds it."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder":
        """A folder inside."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes by name of the files directly inside; empty where there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly inside."""

    @abstractmethod
    def open(self, name: str) -> Reader:
        """A file for reading."""

    @abstractmethod
    def writing(self, name: str) -> "Output":
        """A new file, on the disk or in the store in full when the context ends without an error."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def make(self) -> None:
        """See to it that it is there."""

    @abstractmethod
    def remove(self) -> None:
        """Remove it with all its files, if it is there."""

    @abstractmethod
    def partial(self, name: str) -> "Folder":
        """Where the files are written that `publish` then makes the folder `name`."""

    def begin(self, name: str, manifest: str) -> "Folder":
        """`partial(name)`, made empty; its file `manifest` goes first."""
        partial = self.partial(name)
        partial.delete(manifest)
        partial.remove()
        partial.make()
        return partial

    @abstractmethod
    def publish(self, name: str) -> "Folder":
        """Make `partial(name)`, its manifest written last, the folder `name`, in place of an earlier one."""

    @abstractmethod
    def withdraw(self, name: str, manifest: str) -> None:
        """Remove a published folder so that at no moment half of one passes for a whole."""

    @abstractmethod
    def set_aside(self, name: str, aside: str, manifest: str) -> None:
        """Give a published folder another name, under which it does not count, in place of one of that name."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what was begun and never published, and what was half removed."""

    def read(self, name: str) -> bytes:
        """A whole file."""
        size = self.sizes().get(name)
        if size is None:
            raise FileNotFoundError(f"{self}/{name} is missing")
        out, reader = bytearray(size), self.open(name)
        try:
            got = reader.read_into(memoryview(out), 0)
        finally:
            reader.close()
        return bytes(out[:got])

    def write(self, name: str, data: bytes) -> None:
        """A whole file, durable."""
        with self.writing(name) as file:
            file.write(data)


class Output(ABC):
    """A file being written, as a context: durable when it ends well."""

    @abstractmethod
    def write(self, data: "bytes | memoryview") -> Any:
        """Append all of `data`."""

    @abstractmethod
    def __enter__(self) -> "Output": ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def folder_at(where: "Path | str | Folder") -> Folder:
    """The folder at a path or URL, whether or not it exists. `file://` and `local://` mean a path.

    Raises:
        UserError: a URL whose protocol fsspec does not know, or lacks a library for.
    """
    if isinstance(where, Folder):
        return where
    text = str(where)
    protocol, separator, rest = text.partition("://")
    if not separator or isinstance(where, Path):
        return LocalFolder(Path(text).expanduser().absolute())
    if protocol in ("file", "local"):
        return LocalFolder(Path(rest).absolute())
    from octofold.train.checkpoint.remote import remote_folder

    return remote_folder(text)


class LocalFolder(Folder):
    """A folder on a disk that this machine has mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "LocalFolder":
        return LocalFolder(self.path.parent)

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    def sizes(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in self._entries() if entry.is_file()}

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_dir())

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, name: str) -> "LocalReader":
        return LocalReader(self.path / name)

    def writing(self, name: str) -> "LocalOutput":
        return LocalOutput(self.path / name)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    def partial(self, name: str) -> "LocalFolder":
        return self / f".{name}.partial"

    def publish(self, name: str) -> "LocalFolder":
        written, final = self.partial(name), self / name
        _flush(written.path)
        if final.path.exists():
            exchange(written.path, final.path)
            _flush(self.path)
            written.remove()
        else:
            written.path.rename(final.path)
            _flush(self.path)
        return final

    def withdraw(self, name: str, manifest: str) -> None:
        aside = self / f".{name}.removed"
        aside.remove()
        (self.path / name).rename(aside.path)
        aside.remove()

    def set_aside(self, name: str, aside: str, manifest: str) -> None:
        (self / aside).remove()
        (self.path / name).rename(self.path / aside)
        _flush(self.path)

    def sweep(self) -> None:
        for name in self.folders():
            if name.startswith(".step_") and name.endswith((".partial", ".removed")):
                (self / name).remove()


class LocalReader:
    """Reads a file of a disk."""

    AHEAD_BYTES = 32 * 2**20

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, out: memoryview, begin: int) -> int:
        """See `Reader`."""
        done = 0
        while done < len(out):
            got = os.preadv(self._descriptor, [out[done:]], begin + done)
            if got == 0:
                break
            done += got
        # The disk fetches what is likely next while this block is looked at.
        os.posix_fadvise(self._descriptor, begin + done, self.AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        return done

    def close(self) -> None:
        """See `Reader`."""
        os.close(self._descriptor)


class LocalOutput(Output):
    """Writes a file of a disk, and flushes it to the disk at the end."""

    BUFFER_BYTES = 2**20
    """Small tensors are written together."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb", buffering=self.BUFFER_BYTES)

    def write(self, data: bytes | memoryview) -> int:
        return self._file.write(data)

    def __enter__(self) -> "LocalOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            # What a full disk did not take would be written again, and fail again.
            with suppress(OSError) if kind is not None else _nothing():
                self._file.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _flush(folder: Path) -> None:
    """Names of files in a folder are on the disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_a_place(url: str, reason: object) -> UserError:
    """What a URL that cannot serve means to the user."""
    return UserError(
        f"checkpoint.dir={url}\n  rule:   a path, or a URL that fsspec can open: {reason}\n"
        "  remedy: install what that protocol needs, or name another place"
    )
