"""Readers: from files to documents, surviving what is corrupt. (Streams from the hub: `stream.py`.)"""

import glob
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from octofold.backends.errors import ConfigError
from octofold.train.data.config import DataConfig
from octofold.train.data.corrupt import CorruptReport

if TYPE_CHECKING:
    import pyarrow as pa

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq")}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_PARQUET_ROWS = 256


def list_files(config: DataConfig) -> list[Path]:
    """The files of a source, sorted by path.

    Folders are searched recursively, hidden files and folders left out: by suffix for jsonl and parquet, every file
    for text. A file named outright, or matched by a glob, is taken whatever its suffix.

    Raises:
        ConfigError: there are none.
    """
    if config.source == "stdlib":
        import sysconfig

        root = Path(sysconfig.get_path("stdlib"))
        found = [f for f in root.rglob("*.py") if not _STDLIB_SKIPPED & set(f.relative_to(root).parts)]
    else:
        assert config.path is not None, "checked by config.check"
        named = [config.path] if os.path.exists(config.path) else glob.glob(config.path, recursive=True)
        found = [file for name in named for file in _expand(Path(name), config.source)]
    files = sorted({file.absolute() for file in found if file.is_file()})
    if not files:
        suffixes = " or ".join(_SUFFIXES.get(config.source, ["any"]))
        rule = f"data={config.source} found no file there (suffix: {suffixes}, also with .gz or .zst)"
        raise ConfigError("data.path", str(config.path), rule, "a file, a folder that holds such files, or a glob")
    return files


def _expand(path: Path, source: str) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        name = file.name.removesuffix(file.suffix) if file.suffix in _COMPRESSION else file.name
        if not hidden and name.endswith(_SUFFIXES.get(source, "")):
            yield file


def read_documents(config: DataConfig, files: list[Path], report: CorruptReport) -> Iterator[str]:
    """The documents of these files in order: not empty, and expressible in UTF-8.

    What cannot be read is skipped and entered in the report; documents read before a file breaks are kept.

    Raises:
        UserError: more than `config.max_corrupt_share` is bad (`CorruptReport` states the rule).
    """
    import pyarrow as pa

    readers: dict[str, Callable[[Path, str, CorruptReport], Iterator[str | None]]] = {
        "stdlib": _read_text,
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    report.files = len(files)
    for file in files:
        try:
            for text in readers[config.source](file, config.text_key, report):
                report.check(config.max_corrupt_share, final=False)
                if text:
                    yield text
        except (OSError, pa.ArrowException) as error:
            report.bad_file(str(file), _reason(error))
    report.check(config.max_corrupt_share, final=True)


def accept(value: object, place: str, report: CorruptReport) -> str | None:
    """The value if it is a document (counted as a record), else None (entered as a bad record)."""
    if not isinstance(value, str):
        report.bad_record(place, f"not a string but {type(value).__name__}")
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        report.bad_record(place, _reason(error))
        return None
    report.records += 1
    return value


def missing_key_reason(key: str, present: list[str]) -> str:
    """Why a record without the key is bad, with what it holds instead."""
    return f"no field {key!r} (data.text_key); it has: {', '.join(map(str, present[:10])) or 'nothing'}"


def _open(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed by suffix. A truncated stream raises OSError where it ends."""
    import pyarrow as pa

    compression = _COMPRESSION.get(file.suffix)
    if compression and not file.stat().st_size:
        raise OSError("an empty file is no compressed stream")
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression=compression)))


def _read_text(file: Path, _key: str, report: CorruptReport) -> Iterator[str | None]:
    try:
        with _open(file) as stream:
            text = stream.read().decode()
    except UnicodeDecodeError as error:
        report.bad_record(str(file), _reason(error))
        yield None
    except OSError as error:
        report.bad_file(str(file), _reason(error), lost_records=1)
        yield None
    else:
        report.records += 1
        yield text


def _read_jsonl(file: Path, key: str, report: CorruptReport) -> Iterator[str | None]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                report.bad_record(place, _reason(error))
                yield None
                continue
            if isinstance(record, dict) and key in record:
                yield accept(record[key], place, report)
            else:
                reason = missing_key_reason(key, list(record)) if isinstance(record, dict) else "not a JSON object"
                report.bad_record(place, reason)
                yield None


def _read_parquet(file: Path, key: str, report: CorruptReport) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        if key not in parquet.schema_arrow.names:
            reason = missing_key_reason(key, parquet.schema_arrow.names)
            report.bad_file(str(file), reason, lost_records=parquet.metadata.num_rows)
            yield None
            return
        row = lost = 0
        reasons: list[str] = []
        for group in range(parquet.num_row_groups):
            end = row + parquet.metadata.row_group(group).num_rows
            try:
                for rows in parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[key]):
                    for value in rows.column(0):
                        yield _accept_scalar(value, f"{file}:{row}", report)
                        row += 1
            except (OSError, pa.ArrowException) as error:
                reasons.append(f"row group {group}: {_reason(error)}")
                lost += end - row
            row = end
        if reasons:
            report.bad_file(str(file), "; ".join(reasons[:3]), lost_records=lost)
            yield None


def _accept_scalar(scalar: "pa.Scalar", place: str, report: CorruptReport) -> str | None:
    """`accept` for a pyarrow scalar, whose bytes may not be UTF-8."""
    try:
        return accept(scalar.as_py(), place, report)
    except UnicodeDecodeError as error:
        report.bad_record(place, _reason(error))
        return None


def _reason(error: Exception) -> str:
    """The first line of an error, with its type where the text alone says little."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
