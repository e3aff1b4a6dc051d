"""Checkpoints in an object store, which renames nothing and may be away; and saves that fail and are tried again."""

import errno
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_tasks
import stores
import torch
from run_configs import newest, steps_of, tiny_run, write_corpus

from octofold.backends.errors import UserError
from octofold.train.checkpoint import claim
from octofold.train.checkpoint.claim import claimed
from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.checkpoint.validity import find_valid, valid_checkpoints
from octofold.train.config import CheckpointConfig
from octofold.train.main import Outcome, train

TENSORS = {"model.weight": torch.arange(12.0).view(3, 4)}


@pytest.fixture(params=["objects", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store without renaming, and of fsspec's own in memory."""
    stores.register()
    return f"objects://{tmp_path}/store!runs/one" if request.param == "objects" else f"memory://{tmp_path}/runs/one"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    stores.register()
    yield f"objects://{tmp_path}/store!runs/one"
    stores.ObjectStore.writes_left = None
    stores.ObjectStore.hold.set()


def checkpointer(url: str, told: list[str], **config: Any) -> Checkpointer:
    settings = CheckpointConfig(dir=url, **config)
    return Checkpointer(Path("nowhere"), settings, torch.device("cpu"), warn=told.append)


def save(saver: Checkpointer, step: int) -> None:
    saver.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step})


def loaded(saver: Checkpointer) -> tuple[int, torch.Tensor]:
    tensors = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    return saver.load(saver.place, tensors).state["step"], tensors["model.weight"]


def mistakes(told: list[str]) -> list[str]:
    """Warnings but for those of a busy machine: that a save waited for the one before it."""
    return [line for line in told if " waited " not in line]


def test_a_store_holds_checkpoints_like_a_disk(url, world_of_one):
    told: list[str] = []
    saver = checkpointer(url, told, keep=2)
    for step in (1, 2, 3):
        save(saver, step)
    assert str(saver.wait()) == f"{url}/step_3"
    assert find_valid(url).path.name == "step_3"
    assert sorted(folder_at(url).folders()) == ["step_2", "step_3"]
    step, weight = loaded(saver)
    assert (step, mistakes(told)) == (3, [])
    assert torch.equal(weight, TENSORS["model.weight"] + 3)
    save(saver, 2)  # the course of step 3 was left
    saver.wait()
    assert find_valid(url).path.name == "step_2"
    for step in (3, 4, 5, 6):  # the new course has a step 3 of its own
        save(saver, step)
    saver.wait()
    assert sorted(folder_at(url).folders()) == ["step_3.left_at_2", "step_5", "step_6"]
    assert read_manifest(folder_at(url) / "step_3.left_at_2").state["step"] == 3, "nobody deletes what is set aside"


def test_a_damaged_object_is_passed_over(url, world_of_one):
    told: list[str] = []
    saver = checkpointer(url, told)
    for step in (1, 2):
        save(saver, step)
    saver.wait()
    folder = folder_at(url) / "step_2"
    (name,) = [name for name in folder.sizes() if name.endswith(".safetensors")]
    content = bytearray(folder.read(name))
    content[-1] ^= 1
    folder.write(name, bytes(content))
    assert loaded(saver)[0] == 1
    assert f"step_2/{name} cannot be read" in mistakes(told)[0]


def test_a_store_that_is_away_delays_and_warns(store, world_of_one):
    """The last good one stays; what was half uploaded is no checkpoint."""
    told: list[str] = []
    saver = checkpointer(store, told, max_failures=2)
    save(saver, 1)
    saver.wait()
    stores.ObjectStore.writes_left = 1  # the tensors, and then no manifest
    save(saver, 2)
    with pytest.raises(UserError, match=r"step_2 could not be written: rank 0: .*503 slow down"):
        saver.wait()
    assert "could not be written" in mistakes(told)[0]
    assert find_valid(store).path.name == "step_1"
    stores.ObjectStore.writes_left = None
    save(saver, 3)
    saver.wait()
    assert find_valid(store).path.name == "step_3"
    stores.ObjectStore.writes_left = 0
    save(saver, 4)
    save(saver, 5)
    with pytest.raises(UserError, match=r"checkpoint.max_failures=2 in a row \(2 now\)"):
        save(saver, 6)
    assert find_valid(store).path.name == "step_3"


def test_training_goes_on_while_a_slow_store_takes_a_checkpoint(store, world_of_one):
    """What is saved are the numbers of that moment; the next save waits for it, and says so."""
    told: list[str] = []
    saver = checkpointer(store, told)
    weight = torch.ones(3, 4)
    stores.ObjectStore.hold.clear()
    saver.save(1, {"model.weight": weight}, {"step": 1})
    weight.mul_(7)
    assert not folder_at(store).folders()
    threading.Timer(0.3, stores.ObjectStore.hold.set).start()
    saver.save(2, {"model.weight": weight}, {"step": 2})
    assert re.fullmatch(r"step 2 waited \d\.\d s until the checkpoint of step 1 was written", told[0])
    saver.wait()
    for step, value in ((1, 1.0), (2, 7.0)):
        read = {"model.weight": torch.empty(3, 4)}
        saver.load(f"{store}/step_{step}", read)
        assert (read["model.weight"] == value).all()


def test_a_store_has_one_owner(store, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    place = folder_at(store)
    with claimed(place):
        # As another machine would see it.
        monkeypatch.setattr(claim.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(UserError, match="in use by another run"), claimed(place):
            pass
    assert place.sizes() == {}
    place.write(claim.OWNER, b'{"host": "gone", "pid": 1, "beat": 7}')
    with claimed(place):
        assert b"elsewhere" in place.read(claim.OWNER)


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(claim.fcntl, "lockf", lockf)
    with claimed(folder_at(str(tmp_path / "place"))):
        assert "cannot be locked: Function not implemented" in capsys.readouterr().err
    assert list((tmp_path / "place").iterdir()) == []


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match=r"checkpoint\.dir=nonsense://x"):
        folder_at("nonsense://x")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("places"))


def test_a_run_saves_into_a_store_and_goes_on_from_it(root, store, tmp_path):
    place = {"checkpoint": {"every_steps": 1, "dir": store}, "precision": {"name": "bf16"}}
    assert train(tiny_run(root, **place), tmp_path / "run") == Outcome(3)
    assert list(valid_checkpoints(folder_at(store))[0]) == [1, 2, 3]
    assert not (tmp_path / "run" / "checkpoints").exists()
    longer = {"train": {"steps": 4}, "resume": store, **place}
    assert train(tiny_run(root, **longer), tmp_path / "run") == Outcome(4)
    with pytest.raises(UserError, match="a run that begins needs a place without checkpoints; there is step_4"):
        train(tiny_run(root, **place), tmp_path / "another")


@pytest.fixture
def small_place(tmp_path: Path) -> Iterator[Path]:
    """A run's folder of checkpoints on a disk of 6 MB."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("n", [1, 2])
def test_a_full_disk_delays_a_run(n, root, small_place, ranks):
    """Room for one checkpoint of 3.8 MB and a half: saves fail and are warned of, the first checkpoint stays."""
    config = tiny_run(
        root, n, train={"steps": 4}, checkpoint={"every_steps": 1, "max_failures": 3}, precision={"name": "bf16"}
    )
    told, error = ranks(n).run(run_tasks.run_on_a_full_disk, config, small_place.parent)[0]
    for step, times in ((2, 1), (3, 1), (4, 3)):
        failed = [line for line in told if f"step_{step} could not be written" in line and "next interval" in line]
        assert len(failed) == times
        assert all("No space left" in line for line in failed)
    assert "step_4 could not be written" in error
    assert steps_of(small_place.parent) == [1]
    assert [path.name for path in small_place.iterdir()] == ["step_1"]
    assert newest(small_place.parent).name == "step_1"


@pytest.mark.parametrize("n", [1, 2])
def test_room_that_is_made_in_time_saves_the_last_step(n, root, small_place, ranks):
    (in_the_way := small_place / "big").write_bytes(bytes(4 << 20))
    config = tiny_run(root, n, train={"steps": 2}, precision={"name": "bf16"})
    told, error = ranks(n).run(run_tasks.run_on_a_full_disk, config, small_place.parent, in_the_way)[0]
    assert error == ""
    assert any("the run ends here, so it is tried again in 0 s" in line for line in told)
    assert steps_of(small_place.parent) == [2]
