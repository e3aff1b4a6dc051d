"""A disk that fails for a moment is waited for; one that goes on failing costs no checkpoint."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import run_tasks
import torch

from octofold.backends.errors import UserError
from octofold.train.checkpoint import patience
from octofold.train.checkpoint.checksums import DamagedError, UnreadableError
from octofold.train.checkpoint.claim import claimed
from octofold.train.checkpoint.folders import LocalFolder
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import CheckpointConfig

TENSORS = {"model.a": torch.arange(6.0), "model.b": torch.arange(4.0)}


def on_a_checkpointer(run_dir: Path, task: Callable[[Checkpointer], object], told: list[str] | None = None) -> object:
    """What `task` returns of the checkpoints of a run on a world of one; `told` takes the warnings."""
    warn = (told if told is not None else []).append
    return run_tasks.alone(
        lambda: task(Checkpointer(run_dir, CheckpointConfig(keep=2), torch.device("cpu"), warn=warn))
    )


def save(*steps: int) -> Callable[[Checkpointer], None]:
    def task(checkpointer: Checkpointer) -> None:
        for step in steps:
            checkpointer.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step})
            checkpointer.wait()

    return task


def load(checkpointer: Checkpointer) -> int:
    tensors = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    step: int = checkpointer.load(checkpointer.run_dir, tensors).state["step"]
    assert torch.equal(tensors["model.a"], TENSORS["model.a"] + step)
    return step


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    on_a_checkpointer(tmp_path, save(1, 2))
    return tmp_path


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`failing(times, *parts)`: the next reads of paths with one of these parts fail; returns what was read in vain."""
    monkeypatch.setattr(patience, "WAITS_S", (0.001, 0.002, 0.003))
    opened = os.open

    def fail(times: int, *parts: str, number: int = errno.EIO) -> list[str]:
        failed: list[str] = []

        def broken(path: object, *args: object, **kwargs: object) -> int:
            if len(failed) < times and any(part in str(path) for part in parts):
                failed.append(str(path))
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", broken)
        return failed

    return fail


@pytest.mark.parametrize("part", ["step_2/manifest.json", "step_2/shard"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_failure_that_passes_is_waited_for(part, number, run_dir, failing):
    told: list[str] = []
    failed = failing(2, part, number=number)
    assert on_a_checkpointer(run_dir, load, told) == 2
    assert (len(failed), told) == (2, [])


@pytest.mark.parametrize("part", ["step_2/manifest.json", "step_2/shard"])
def test_one_that_stays_is_told_and_the_older_checkpoint_loaded(part, run_dir, failing):
    told: list[str] = []
    failing(10**6, part)
    assert on_a_checkpointer(run_dir, load, told) == 1
    (warning,) = told
    assert part in warning or "step_2" in warning
    assert "Input/output error" in warning


def test_a_file_that_is_gone_is_not_waited_for(run_dir, failing):
    failed = failing(10**6, "step_2/shard", number=errno.ENOENT)
    assert on_a_checkpointer(run_dir, load) == 1
    assert len(failed) == 1


def test_what_may_not_be_read_is_whole_all_the_same(run_dir, failing):
    failed = failing(10**6, "step_1", "step_2", number=errno.EACCES)
    with pytest.raises(UnreadableError, match="Permission denied"):
        on_a_checkpointer(run_dir, load)
    assert len(failed) == 2, "waiting mends no permissions"


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EIO])
def test_a_place_that_cannot_be_listed_may_be_there_later(number, run_dir, monkeypatch):
    monkeypatch.setattr(patience, "WAITS_S", (0.001,))

    def away(path: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "scandir", away)
    with pytest.raises(UnreadableError, match=os.strerror(number)) as raised:
        on_a_checkpointer(run_dir, load)
    assert raised.value.status == 1
    with pytest.raises(UserError) as raised, claimed(Away(run_dir / "checkpoints")):
        pass
    assert raised.value.status == 1


class Away(LocalFolder):
    """A mount whose server is gone."""

    def make(self) -> None:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(self.path))


def test_where_nothing_can_be_read_nothing_is_damaged(run_dir, failing):
    failing(10**6, "step_1", "step_2")
    with pytest.raises(UnreadableError, match=r"(?s)no checkpoint that can be read now.*nothing was removed") as raised:
        on_a_checkpointer(run_dir, load)
    assert raised.value.status == 1, "an agent may try again"
    assert UserError.status == DamagedError.status == 2


def test_retention_removes_no_checkpoint_that_it_cannot_read(run_dir, failing):
    failing(10**6, "step_1/manifest.json")
    on_a_checkpointer(run_dir, save(3, 4, 5))
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"step_1", "step_4", "step_5"} <= left
