"""Every byte of a checkpoint matters: whatever is done to any file, the load refuses it, names it and falls back."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import UserError
from octofold.train.checkpoint import checksums
from octofold.train.checkpoint.checksums import DamagedError
from octofold.train.checkpoint.claim import claimed
from octofold.train.checkpoint.folders import LocalFolder, folder_at
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.checkpoint.retention import retired
from octofold.train.checkpoint.validity import check_in_full, find_valid
from octofold.train.checkpoint.windows import pieces
from octofold.train.config import CheckpointConfig

BLOCK = 64
"""Small, so that a small file has many blocks."""
TENSORS = {
    "model.matrix": torch.arange(120, dtype=torch.float32).view(8, 15),
    "model.bias": torch.arange(7, dtype=torch.bfloat16),
    "optim.scalar": torch.tensor(3.0),
    "precision.history": torch.arange(5, dtype=torch.int64),
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("checksums", "writing"):
            patch.setattr(f"octofold.train.checkpoint.{module}.BLOCK_BYTES", BLOCK)
        yield


def save(run_dir: Path, *steps: int, **config: Any) -> None:
    """Checkpoints whose numbers tell their step, saved on a world of one."""

    def saved() -> None:
        checkpointer = Checkpointer(run_dir, CheckpointConfig(**config), torch.device("cpu"))
        for step in steps:
            checkpointer.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step})
            checkpointer.wait()

    run_tasks.alone(saved)


def load(where: Path, told: list[str] | None = None, **config: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """The step that is loaded, and the tensors; `told` takes the warnings."""

    def loaded() -> tuple[int, dict[str, torch.Tensor]]:
        tensors = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
        warn = (told if told is not None else []).append
        checkpointer = Checkpointer(where, CheckpointConfig(**config), torch.device("cpu"), warn=warn)
        return checkpointer.load(where, tensors).state["step"], tensors

    result: tuple[int, dict[str, torch.Tensor]] = run_tasks.alone(loaded)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("saved")
    save(run_dir, 1, 2)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files(run_dir: Path, step: int = 2) -> list[Path]:
    return sorted((run_dir / "checkpoints" / f"step_{step}").iterdir())


def assert_falls_back(run_dir: Path, name: str) -> None:
    told: list[str] = []
    step, tensors = load(run_dir, told)
    assert step == 1
    assert all(torch.equal(tensors[key], tensor + 1) for key, tensor in TENSORS.items())
    (warning,) = told
    assert name in warning
    with pytest.raises(DamagedError, match=name):
        check_in_full(folder_at(run_dir / "checkpoints" / "step_2"))
    with pytest.raises(UserError, match=name):
        load(run_dir / "checkpoints" / "step_2")


def test_what_is_saved_is_what_is_loaded(saved):
    step, tensors = load(saved)
    assert step == 2
    assert all(torch.equal(tensors[name], tensor + 2) for name, tensor in TENSORS.items())
    assert find_valid(saved).skipped == []
    assert len(read_manifest(saved / "checkpoints" / "step_2").files["shard-00001-of-00001.safetensors"].blocks) > 8


@settings(max_examples=120)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(saved, data, tmp_path_factory):
    run_dir = Path(shutil.copytree(saved, tmp_path_factory.mktemp("flip") / "run"))
    path = data.draw(st.sampled_from(files(run_dir)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert_falls_back(run_dir, path.name)
    shutil.rmtree(run_dir)


@settings(max_examples=20)
@given(data=st.data())
def test_a_file_of_another_length_is_found(saved, data, tmp_path_factory):
    run_dir = Path(shutil.copytree(saved, tmp_path_factory.mktemp("cut") / "run"))
    path = data.draw(st.sampled_from(files(run_dir)))
    size = path.stat().st_size
    os.truncate(path, data.draw(st.integers(0, 2 * size).filter(lambda length: length != size)))
    assert_falls_back(run_dir, path.name)
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_file_is_found(number, run_dir):
    path = files(run_dir)[number]
    path.unlink()
    assert_falls_back(run_dir, path.name)


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_of_another_checkpoint_is_found(number, run_dir):
    path = files(run_dir)[number]
    shutil.copy(files(run_dir, 1)[number], path)
    assert_falls_back(run_dir, path.name)


def test_a_checkpoint_under_another_name_is_found(run_dir):
    (run_dir / "checkpoints" / "step_2").rename(run_dir / "checkpoints" / "step_5")
    assert find_valid(run_dir).path.name == "step_1"
    (skipped,) = find_valid(run_dir).skipped
    assert "is of step 2" in str(skipped)
    told: list[str] = []
    load(run_dir, told)
    assert told == [f"{skipped}; passed over"]


def test_an_added_file_of_tensors_is_found(run_dir):
    shutil.copy(files(run_dir, 1)[1], run_dir / "checkpoints" / "step_2" / "shard-00002-of-00002.safetensors")
    assert_falls_back(run_dir, "shard-00002-of-00002")


def test_nothing_valid_is_told_with_every_reason(run_dir):
    for step in (1, 2):
        files(run_dir, step)[1].write_bytes(b"")
    with pytest.raises(UserError, match="holds no valid checkpoint") as caught:
        load(run_dir)
    assert all(f"step_{step}/shard-00001" in str(caught.value) for step in (1, 2))


def test_a_checkpoint_of_format_1_is_read(run_dir):
    """It has sizes and no checksums."""
    folder = run_dir / "checkpoints" / "step_2"
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    document = {"format": 1, "state": {"step": 2}, "file_bytes": sizes}
    (folder / "manifest.json").write_text(json.dumps(document, indent=2) + "\n")
    assert load(run_dir)[0] == 2
    os.truncate(files(run_dir)[1], 100)
    assert find_valid(run_dir).path.name == "step_1"


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
    itemsize=st.sampled_from([1, 4, 2**14]),
)
def test_pieces_make_up_any_window(shape, data, itemsize):
    """Whatever is read together, each number of the window is read once and goes where it belongs."""
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    lengths = [data.draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    whole = torch.arange(torch.Size(shape).numel())
    window = torch.full(lengths, -1)
    for piece in pieces(shape, offsets, lengths, itemsize):
        rows = whole[piece.first : piece.first + torch.Size(piece.shape).numel()].view(piece.shape)
        assert (window[piece.target] == -1).all()
        window[piece.target] = rows[piece.inside]
    expected = whole.view(shape)[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(window, expected)


@given(sizes=st.lists(st.integers(0, 200), max_size=6), header=st.integers(8, 100))
def test_checksums_do_not_depend_on_how_a_file_was_written(sizes, header):
    content = os.urandom(header) + b"".join(os.urandom(size) for size in sizes)
    sums = checksums.BlockSums(header)
    begin = 0
    for size in [header, *sizes]:
        sums.update(memoryview(content)[begin : begin + size])
        begin += size
    record = sums.record()
    assert record.nbytes == len(content)
    assert record.count == len(record.blocks)
    for number, digest in enumerate(record.blocks):
        first, last = record.bounds(number)
        assert digest == checksums.checksum(content[first:last])
    assert record.bounds(record.count - 1)[1] == len(content)


HOUR = 3600.0
RETENTION = [
    pytest.param({"keep": 2}, [1, 2, 3, 4], [], [1, 2], [], id="the newest"),
    pytest.param({"keep": 0}, [1, 2, 3], [], [], [], id="all"),
    pytest.param({"keep": 1, "keep_hours": 2.5}, [1, 2, 3, 4, 5], [], [1, 2], [], id="the young"),
    pytest.param({"keep": 1, "keep_every_steps": 2}, [1, 2, 3, 4, 5], [], [1, 3], [], id="milestones"),
    pytest.param({"keep": 3}, [4, 5], [3, 6], [], [3], id="not valid, two newer"),
    pytest.param({"keep": 1}, [4, 5], [3], [4], [], id="not valid, one newer that stays"),
    pytest.param({"keep": 0}, [4, 5, 6], [3], [], [], id="not valid, and all are kept"),
]


@pytest.mark.parametrize(("config", "valid", "invalid", "old", "broken"), RETENTION)
def test_retention(config, valid, invalid, old, broken):
    """Step n was saved n hours after the first."""
    times = {step: step * HOUR for step in valid}
    assert retired(CheckpointConfig(**config), times, invalid, valid[-1] * HOUR) == (old, broken)


def test_what_is_not_valid_stays_until_two_newer_are(run_dir):
    files(run_dir)[1].write_bytes(b"")
    names = lambda: sorted(path.name for path in (run_dir / "checkpoints").iterdir())  # noqa: E731
    save(run_dir, 3)
    assert names() == ["step_1", "step_2", "step_3"]
    save(run_dir, 4)
    assert names() == ["step_1", "step_3", "step_4"]


def test_what_loading_found_damaged_does_not_count_as_kept(run_dir):
    """By its size it is whole; it must not push out the one that the run was continued from."""
    shard = files(run_dir)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    def go_on() -> list[str]:
        checkpointer = Checkpointer(run_dir, CheckpointConfig(keep=2), torch.device("cpu"))
        tensors = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
        assert checkpointer.load(run_dir, tensors).state["step"] == 1
        checkpointer.save(3, TENSORS, {"step": 3})
        checkpointer.wait()
        return sorted(path.name for path in (run_dir / "checkpoints").iterdir())

    assert run_tasks.alone(go_on) == ["step_1", "step_2", "step_3"]


@pytest.mark.parametrize("left", ["removed", "partial"])
def test_a_checkpoint_that_a_crash_took_the_name_of_gets_it_back(left, run_dir):
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "step_2").rename(checkpoints / f".step_2.{left}")
    shutil.copytree(checkpoints / "step_1", checkpoints / ".step_9.partial")  # of another step
    save(run_dir, 3, keep=0)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_1", "step_2", "step_3"]
    assert load(checkpoints / "step_2")[0] == 2


def test_leftovers_that_cannot_be_removed_fail_no_save(run_dir, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(LocalFolder, "sweep", refuse)
    save(run_dir, 3)
    assert find_valid(run_dir).path.name == "step_3"


def own(folder: Path, begun: Any, end: Any) -> None:
    with claimed(folder_at(folder)):
        begun.set()
        end.wait()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts a process that owns `tmp_path`."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start() -> Any:
        begun, end = context.Event(), context.Event()
        process = context.Process(target=own, args=(tmp_path, begun, end))
        process.start()
        assert begun.wait(60)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_place_in_use_is_refused_and_a_dead_owner_is_not_one(owner, tmp_path):
    process = owner()
    with (
        pytest.raises(UserError, match=f"in use by another run: process {process.pid} on ") as caught,
        claimed(folder_at(tmp_path)),
    ):
        pass
    assert "remedy:" in str(caught.value)
    process.kill()
    process.join()
    with claimed(folder_at(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"), claimed(folder_at(tmp_path / "file" / "checkpoints")):
        pass
