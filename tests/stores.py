"""An object store for tests: objects and prefixes, no renaming, no folders; and it can be made unreachable.

Its objects lie as files under a folder, so that several processes see one store.
"""

import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec  # type: ignore[import-untyped]
from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]


class BrokenStoreError(Exception):
    """What libraries of stores raise: no OSError."""


class ObjectStore(AbstractFileSystem):  # type: ignore[misc]
    """objects:///absolute/folder/of/the/store!key/of/an/object"""

    protocol = "objects"
    cachable = False
    writes_left = None
    """Objects that may still be written before the store is unreachable; None: any number."""
    hold = threading.Event()
    """While it is not set, writing waits."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("objects://").rstrip("/")

    def _split(self, path: str) -> tuple[Path, str]:
        root, _, key = self._strip_protocol(path).partition("!")
        return Path(root), key

    def _objects(self, root: Path) -> dict[str, Path]:
        return {unquote(path.name): path for path in root.iterdir()} if root.exists() else {}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Objects and prefixes right below a prefix."""
        root, prefix = self._split(path)
        found: dict[str, dict[str, Any]] = {}
        for key, file in self._objects(root).items():
            if not key.startswith(f"{prefix}/"):
                continue
            head, more, _ = key[len(prefix) + 1 :].partition("/")
            name = f"{root}!{prefix}/{head}"
            size = None if more else file.stat().st_size
            found[name] = {"name": name, "size": size, "type": "directory" if more else "file"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def exists(self, path: str, **_: Any) -> bool:
        """Whether an object or anything below it is there."""
        root, key = self._split(path)
        return any(other == key or other.startswith(f"{key}/") for other in self._objects(root))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete all objects below a prefix."""
        root, prefix = self._split(path)
        for key, file in self._objects(root).items():
            if key.startswith(f"{prefix}/"):
                file.unlink()

    def rm_file(self, path: str) -> None:
        """Delete an object."""
        root, key = self._split(path)
        (root / quote(key, safe="")).unlink()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Stores have no folders."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """A range of an object."""
        root, key = self._split(path)
        return (root / quote(key, safe="")).read_bytes()[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "wb", "checkpoints are read in ranges"
        return _Upload(self, *self._split(path))

    def mv(self, *_: Any, **__: Any) -> None:
        """Not here."""
        raise AssertionError("an object store does not rename")


class _Upload:
    """An object appears whole, when it is closed."""

    def __init__(self, store: ObjectStore, root: Path, key: str) -> None:
        self._store, self._root, self._key, self._parts = store, root, key, list[bytes]()

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def close(self) -> None:
        ObjectStore.hold.wait()
        if ObjectStore.writes_left is not None:
            if ObjectStore.writes_left == 0:
                raise BrokenStoreError("503 slow down")
            ObjectStore.writes_left -= 1
        self._root.mkdir(parents=True, exist_ok=True)
        temporary = self._root / f"%{os.getpid()}"
        temporary.write_bytes(b"".join(self._parts))
        temporary.rename(self._root / quote(self._key, safe=""))

    def discard(self) -> None:
        self._parts = []


ObjectStore.hold.set()


def register() -> None:
    """Make the protocol known to fsspec in this process."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
