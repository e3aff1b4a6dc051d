"""A folder in an object store or on another machine, through fsspec. Torch-free.

There is no renaming here: the manifest, written last, publishes a checkpoint, and is the first to go. Whatever a
library raises becomes an OSError, so that a store which cannot be reached is one kind of failure.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import fsspec  # type: ignore[import-untyped]

from octofold.train.checkpoint.folders import Folder, Output, not_a_place

COPY_BYTES = 4 * 2**20


def remote_folder(url: str) -> "RemoteFolder":
    """The folder at a URL.

    Raises:
        UserError: fsspec does not know the protocol, or lacks a library for it.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise not_a_place(url, error) from None
    return RemoteFolder(filesystem, path.rstrip("/"), url.rstrip("/"))


class RemoteFolder(Folder):
    """A common beginning of keys."""

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._fs, self._path, self._url = filesystem, path, url

    def __str__(self) -> str:
        return self._url

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFolder) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def name(self) -> str:
        return self._url.rpartition("/")[2]

    @property
    def parent(self) -> "RemoteFolder":
        return RemoteFolder(self._fs, self._path.rpartition("/")[0], self._url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(self._fs, f"{self._path}/{name}", f"{self._url}/{name}")

    def sizes(self) -> dict[str, int]:
        return {_last(entry["name"]): int(entry["size"] or 0) for entry in self._entries() if entry["type"] == "file"}

    def folders(self) -> list[str]:
        return sorted(_last(entry["name"]) for entry in self._entries() if entry["type"] == "directory")

    def _entries(self) -> list[dict[str, Any]]:
        with _told(self._url):
            # Others write here too.
            self._fs.invalidate_cache(self._path)
            try:
                entries: list[dict[str, Any]] = self._fs.ls(self._path, detail=True)
            except FileNotFoundError:
                return []
        # Some stores list the folder itself among its entries.
        return [entry for entry in entries if entry["name"].rstrip("/").strip("/") != self._path.strip("/")]

    def open(self, name: str) -> "RemoteReader":
        return RemoteReader(self._fs, f"{self._path}/{name}", f"{self._url}/{name}")

    def writing(self, name: str) -> "RemoteOutput":
        return RemoteOutput(self._fs, f"{self._path}/{name}", f"{self._url}/{name}")

    def delete(self, name: str) -> None:
        with _told(f"{self._url}/{name}"), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._path}/{name}")

    def make(self) -> None:
        with _told(self._url):
            self._fs.makedirs(self._path, exist_ok=True)

    def remove(self) -> None:
        with _told(self._url):
            self._fs.invalidate_cache(self._path)
            if self._fs.exists(self._path):
                self._fs.rm(self._path, recursive=True)
            self._fs.invalidate_cache(self._path)

    def partial(self, name: str) -> "RemoteFolder":
        return self / name

    def publish(self, name: str) -> "RemoteFolder":
        return self / name

    def withdraw(self, name: str, manifest: str) -> None:
        (self / name).delete(manifest)
        (self / name).remove()

    def set_aside(self, name: str, aside: str, manifest: str) -> None:
        source, target = self / name, self / aside
        names = source.sizes()
        if manifest not in names:
            return  # It was never published, and does not count as it is.
        for file in [*(n for n in names if n != manifest), manifest]:
            source._copy(file, target, names[file])
        self.withdraw(name, manifest)

    def _copy(self, name: str, target: "RemoteFolder", size: int) -> None:
        """Copy a file, in the store where it can do that by itself."""
        with _told(f"{target}/{name}"):
            try:
                self._fs.cp_file(f"{self._path}/{name}", f"{target._path}/{name}")
                return
            except NotImplementedError:
                pass
        reader, buffer = self.open(name), memoryview(bytearray(COPY_BYTES))
        with target.writing(name) as out:
            for begin in range(0, size, COPY_BYTES):
                out.write(buffer[: reader.read_into(buffer[: size - begin], begin)])

    def sweep(self) -> None:
        pass


class RemoteReader:
    """Reads parts of an object."""

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._fs, self._path, self._url = filesystem, path, url

    def read_into(self, out: memoryview, begin: int) -> int:
        """See `Reader`."""
        with _told(self._url):
            data = self._fs.cat_file(self._path, start=begin, end=begin + len(out))
        out[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """See `Reader`."""


class RemoteOutput(Output):
    """Uploads an object, which is there from the end of the context on."""

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._fs, self._path, self._url = filesystem, path, url

    def __enter__(self) -> "RemoteOutput":
        with _told(self._url):
            self._file = self._fs.open(self._path, "wb")
        return self

    def write(self, data: bytes | memoryview) -> None:
        with _told(self._url):
            self._file.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _told(self._url):
            if kind is None:
                self._file.close()
            else:
                # Closing would upload what there is.
                self._file.discard()


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Have every failure an OSError that names the place."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
