"""Lines outlive a disk that is full for a time: nothing torn, nothing twice, nothing lost unseen."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from octofold.backends.errors import UserError
from octofold.train import lines
from octofold.train.lines import LineFile
from octofold.train.metrics import MetricsWriter, read_metrics


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    """The system refuses to write beyond; at the edge it writes a part, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; where this user may not mount one, a limit stands for it elsewhere in this file."""
    if os.geteuid():
        pytest.skip("only root mounts a file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def numbers(path: Path) -> list[int]:
    return [int(line.split()[0]) for line in path.read_text().splitlines()]


def test_lines_wait_while_nothing_can_be_written_and_follow_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "lines"
    file = LineFile(path, said.append)
    file.append("0 " + "x" * 50)
    with no_file_larger_than(100):
        for number in range(1, 10):
            file.append(f"{number} " + "x" * 50)
            assert numbers(path) == [0], "no part of a line"
    file.append("10")
    file.close()
    file.close()
    assert numbers(path) == list(range(11))
    assert [text.split(str(path))[1][:24] for text in said] == [" cannot be written: File", " can be written again; n"]


def test_lines_beyond_what_memory_keeps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "KEPT_LINES", 3)
    said: list[str] = []
    file = LineFile(tmp_path / "lines", said.append)
    with no_file_larger_than(0):
        for number in range(5):
            file.append(str(number))
    file.append("5")
    assert numbers(tmp_path / "lines") == [3, 4, 5]
    assert "3 line(s) are lost" in said[-1]


def test_lines_that_never_find_room_are_told_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    file = LineFile(tmp_path / "lines", said.append)
    with no_file_larger_than(0):
        file.append("0")
        file.close()
    assert said[-1].endswith("1 line(s) are lost")


def writer(folder: Path, warn: Callable[[str], None], resumed_step: int | None = None) -> MetricsWriter:
    options = {"wandb": False, "tensorboard": False, "resumed_step": resumed_step}
    return MetricsWriter(folder, run_name="test", config={}, warn=warn, **options)  # type: ignore[arg-type]


def test_metrics_outlive_a_full_disk(small_disk: Path) -> None:
    said: list[str] = []
    metrics = writer(small_disk, said.append)
    metrics.log({"kind": "train", "step": 1})
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(b"x" * (1 << 20))
    for step in range(2, 400):
        metrics.log({"kind": "train", "step": step, "text": "x" * 50})
    assert "No space left" in said[0]
    ballast.unlink()
    metrics.log({"kind": "train", "step": 400})
    metrics.close()
    assert [record["step"] for record in read_metrics(small_disk)] == list(range(1, 401))


def test_a_run_goes_on_where_the_disk_is_full(small_disk: Path) -> None:
    metrics = writer(small_disk, print)
    for step in range(1, 100):
        metrics.log({"kind": "train", "step": step})
    metrics.close()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(b"x" * (1 << 20))
    writer(small_disk, print, resumed_step=40).close()
    assert [record["step"] for record in read_metrics(small_disk)] == list(range(1, 41))


def test_a_metrics_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/proc/nowhere/file")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written.*\n  remedy: free space"):
        writer(tmp_path, print)
