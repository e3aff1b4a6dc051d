"""Checkpoints: no pickle, unsplit names, equal on every layout; what is damaged is refused, what is saved is kept."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
import torch
from run_configs import newest, steps_of, tiny_run, write_corpus
from safetensors import safe_open

from octofold.backends.errors import UserError
from octofold.train.build import model_config
from octofold.train.checkpoint.manifest import read_manifest
from octofold.train.checkpoint.storage import read_tensors
from octofold.train.main import Outcome, train
from octofold.train.metrics import METRICS_FILE, read_metrics
from octofold.train.models.registry import load_architecture
from octofold.train.trainer import Trainer

BF16: dict[str, Any] = {"precision": {"name": "bf16"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """The folder of a finished one-rank run with checkpoints of steps 1 to 3."""
    assert train(tiny_run(root, checkpoint={"every_steps": 1, "keep": 0}, **BF16), root / "trained") == Outcome(3)
    return root / "trained"


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A copy of step 3, to be damaged."""
    return Path(shutil.copytree(trained / "checkpoints" / "step_3", tmp_path / "step_3"))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def tensors_of(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, read on a world of one.

    Args:
        more: buffers beside those of the model.
    """

    def read() -> dict[str, torch.Tensor]:
        tensors = expected_tensors() | {f"model.{name}": buffer for name, buffer in more.items()}
        read_tensors(folder, tensors)
        return tensors

    return run_tasks.alone(read)


def expected_tensors() -> dict[str, torch.Tensor]:
    """Empty FP32 tensors under the names and in the shapes of the unsplit model and its optimiser."""
    config = model_config(tiny_run(Path("nowhere"), data={"source": "stdlib"}).model, 257)
    with torch.device("meta"):
        model = load_architecture(config.architecture)(config, kernels=None)  # type: ignore[arg-type]
    shapes = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            shapes[f"optim.{name}.{moment}"] = parameter.shape
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_files_names_and_shapes(trained):
    folder = trained / "checkpoints" / "step_3"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert [path.name for path in folder.glob("*.json")] == ["manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 2
    state = manifest["content"]["state"]
    assert (state["step"], state["updates"], state["loader"]) == (3, 3, {"samples_seen": 24})
    (shard,) = shards_of(folder)
    with safe_open(shard, framework="np") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == {name: tuple(tensor.shape) for name, tensor in expected_tensors().items()}
    assert saved["model.layers.1.mlp.experts.gate_up_proj"] == (8, 2, 32, 64)
    assert saved["model.layers.1.mlp.gate.e_score_correction_bias"] == (8,)


@pytest.mark.parametrize(("n", "expert"), [(2, 2), (2, 1), (4, 2)])
def test_every_layout_writes_the_same_tensors(n, expert, trained, root, ranks, tmp_path):
    """Weights, moments and biases of a trained model pass through another layout bit for bit."""
    original = trained / "checkpoints" / "step_3"
    config = tiny_run(root, n, parallel={"expert": expert}, resume=str(original), **BF16)
    ranks(n).run(run_tasks.resave, config, tmp_path)
    rewritten = newest(tmp_path)
    assert len(shards_of(rewritten)) == n
    assert read_manifest(rewritten).state == read_manifest(original).state
    expected, found = tensors_of(original), tensors_of(rewritten)
    assert expected["optim.layers.1.mlp.experts.down_proj.exp_avg"].abs().sum() > 0
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_replicas_are_written_once_and_the_work_is_shared(trained, root, ranks, tmp_path):
    original = trained / "checkpoints" / "step_3"
    config = tiny_run(root, 4, parallel={"data_replicate": 2}, resume=str(original), **BF16)
    ranks(4).run(run_tasks.resave, config, tmp_path)
    sizes = [path.stat().st_size for path in shards_of(newest(tmp_path))]
    assert len(sizes) == 4
    assert sum(sizes) < 1.1 * sum(path.stat().st_size for path in shards_of(original))
    assert max(sizes) < 1.3 * min(sizes)


class _Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_no_pickle_is_opened(damaged, root, tmp_path):
    mark = tmp_path / "exploded"
    for name in (".metadata", "model.safetensors.index.json", "__0_0.distcp", "state.pt"):
        (damaged / name).write_bytes(pickle.dumps(_Bomb(mark)))
    pickle.loads((damaged / ".metadata").read_bytes())
    mark.rmdir()
    assert train(tiny_run(root, train={"steps": 4}, resume=str(damaged), **BF16), tmp_path / "run") == Outcome(4)
    assert not mark.exists()


def cut(folder: Path) -> None:
    shard = shards_of(folder)[0]
    os.truncate(shard, shard.stat().st_size // 2)


def spoil_header(folder: Path) -> None:
    with shards_of(folder)[0].open("r+b") as file:
        file.seek(8)
        file.write(b"#" * 32)


def rewrite_manifest(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(text)


DAMAGES = [
    pytest.param(cut, r"shard-00001\S*\.safetensors holds \d+ bytes, but \d+ bytes were written", id="truncated shard"),
    pytest.param(lambda f: shards_of(f)[0].unlink(), r"shard-00001\S*\.safetensors is missing", id="missing shard"),
    pytest.param(spoil_header, r"shard-00001\S*\.safetensors cannot be read", id="damaged header"),
    pytest.param(lambda f: (f / "manifest.json").unlink(), "manifest.json is missing", id="missing manifest"),
    pytest.param(rewrite_manifest("{"), "manifest.json cannot be read", id="half a manifest"),
    pytest.param(rewrite_manifest("[]"), "manifest.json cannot be read", id="a list for a manifest"),
    pytest.param(rewrite_manifest('{"state": {}}'), "manifest.json cannot be read", id="manifest without files"),
    pytest.param(
        rewrite_manifest('{"format": 3, "state": {}, "file_bytes": {}}'),
        r"manifest.json has format 3\s+rule:   this version reads formats 1 to 2",
        id="manifest of a later version",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_refused(damage, message, damaged, root, tmp_path):
    damage(damaged)
    with pytest.raises(UserError, match=message) as caught:
        train(tiny_run(root, resume=str(damaged), **BF16), tmp_path / "run")
    assert str(damaged) in str(caught.value)
    assert "remedy:" in str(caught.value)


@pytest.mark.parametrize("damage", [cut, spoil_header])
def test_damaged_checkpoint_is_refused_by_every_rank(damage, damaged, root, ranks, tmp_path):
    damage(damaged)
    config = tiny_run(root, 2, parallel={"expert": 2}, resume=str(damaged), **BF16)
    for message in ranks(2).run(run_tasks.load_error, config, tmp_path / "run"):
        assert shards_of(damaged)[0].name in message


OTHER_MODELS = [
    ({"moe_intermediate_size": 48}, r"gate_up_proj: \[8, 2, 32, 64\] in the checkpoint, \[8, 2, 48, 64\] in the model"),
    ({"num_hidden_layers": 5}, r"model\.layers\.4\.\S+: not in the checkpoint"),
    ({"num_hidden_layers": 3}, r"model\.layers\.3\.\S+: in the checkpoint only"),
]


@pytest.mark.parametrize(("model", "message"), OTHER_MODELS)
def test_checkpoint_of_another_model_is_refused(model, message, trained, root, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train(tiny_run(root, model=model, resume=str(trained), **BF16), tmp_path / "run")
    assert str(trained / "checkpoints" / "step_3") in str(caught.value)
    assert len(str(caught.value).splitlines()) < 16


def test_folder_without_checkpoint_is_refused(root, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(tiny_run(root, resume=str(tmp_path)), tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """`checkpoints` of a run folder on a disk of its own with room for one checkpoint of 3.8 MB and a half."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place.parent
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("n", [1, 2])
def test_full_disk(n, small_disk, trained, root, ranks):
    """The save fails on every rank, what it wrote is gone, and the checkpoint before it still continues."""
    groups: dict[str, Any] = {"parallel": {"expert": n}, **BF16}
    first = tiny_run(root, n, resume=str(trained / "checkpoints" / "step_1"), **groups)
    ranks(n).run(run_tasks.resave, first, small_disk)
    second = tiny_run(root, n, resume=str(trained / "checkpoints" / "step_2"), **groups)
    for message in ranks(n).run(run_tasks.resave_error, second, small_disk):
        assert f"{small_disk}/checkpoints/step_2 could not be written: rank" in message
        assert "No space left" in message
        assert "remedy:" in message
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_1"]
    expected, found = tensors_of(trained / "checkpoints" / "step_1"), tensors_of(newest(small_disk))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("n", [1, 2])
def test_read_only_disk(n, small_disk, trained, root, ranks):
    groups: dict[str, Any] = {"parallel": {"expert": n}, **BF16}
    first = tiny_run(root, n, resume=str(trained / "checkpoints" / "step_1"), **groups)
    ranks(n).run(run_tasks.resave, first, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk / "checkpoints")], check=True)
    second = tiny_run(root, n, resume=str(trained / "checkpoints" / "step_2"), **groups)
    messages = ranks(n).run(run_tasks.resave_error, second, small_disk)
    assert "Read-only file system" in messages[0]
    assert all("step_2 could not be written" in message for message in messages)
    assert newest(small_disk).name == "step_1"


def test_file_in_the_way(trained, root, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    config = tiny_run(root, resume=str(trained), **BF16)
    assert "step_3 could not be written" in run_tasks.alone(run_tasks.resave_error, config, tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4])])
def test_retention_keeps_the_newest(keep, left, root, tmp_path):
    train(tiny_run(root, train={"steps": 4}, checkpoint={"every_steps": 1, "keep": keep}, **BF16), tmp_path)
    assert steps_of(tmp_path) == left


def test_abandoned_partial_is_harmless(trained, root, tmp_path):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    for step in (4, 99):
        partial = run_dir / "checkpoints" / f".step_{step}.partial"
        partial.mkdir()
        (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half a file")
    assert newest(run_dir).name == "step_3"
    assert train(tiny_run(root, train={"steps": 4}, resume=str(run_dir), **BF16), run_dir) == Outcome(4)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_2", "step_3", "step_4"]


def test_resuming_an_earlier_step_sets_later_ones_aside(trained, root, tmp_path):
    """Else the next resume would take a checkpoint of the course that was left for the newest."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    config = tiny_run(root, resume=str(run_dir / "checkpoints" / "step_1"), checkpoint={"keep": 1}, **BF16)
    run_tasks.alone(run_tasks.run, config, run_dir, 2)
    assert newest(run_dir).name == "step_2"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_2", "step_2.left_at_1", "step_3.left_at_1"]
    left, original = tensors_of(run_dir / "checkpoints" / names[2]), tensors_of(trained / "checkpoints" / "step_3")
    assert all(np.array_equal(left[name], original[name]) for name in original)


def test_later_steps_are_set_aside_before_the_first_step(trained, root, tmp_path, monkeypatch):
    """A run that dies before it has saved anything does not return to the course that was left."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    config = tiny_run(root, resume=str(run_dir / "checkpoints" / "step_1"), **BF16)

    def die(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, run_dir)
        assert steps_of(run_dir) == [1]
        shutil.copytree(trained / "checkpoints" / "step_3", run_dir / "checkpoints" / "step_3")
    aside = {"step_2.left_at_1", "step_3.left_at_1", "step_3.left_at_1.2"}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_1", "step_3", *aside}


def test_half_removed_checkpoint_is_not_listed(trained, tmp_path):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    (run_dir / "checkpoints" / "step_3" / "manifest.json").unlink()
    assert steps_of(run_dir) == [1, 2]
    assert newest(run_dir).name == "step_2"


FP8: dict[str, Any] = {"precision": {"name": "fp8_tensor_delayed", "arithmetic": "emulate"}}


@pytest.mark.parametrize("groups", [{}, BF16, FP8], ids=["fp64", "bf16", "fp8"])
def test_what_is_copied_beside_the_next_passes_is_what_was_there(groups, root, ranks, tmp_path):
    """The passes begin while a checkpoint's tensors are still being copied, and the update waits."""
    config = tiny_run(root, 2, train={"steps": 3}, checkpoint={"every_steps": 1, "keep": 0}, **groups)
    late = ranks(2).run(run_tasks.run_while_copies_wait, config, tmp_path / "late")
    assert [rank["overlapped"] for rank in late] == [2, 2]
    at_once = tiny_run(
        root, 2, train={"steps": 3}, checkpoint={"every_steps": 1, "asynchronous": False, "keep": 0}, **groups
    )
    ranks(2).run(run_tasks.run, at_once, tmp_path / "at_once")
    for step in (1, 2, 3):
        passes = torch.zeros((), dtype=torch.int64)
        found = tensors_of(tmp_path / "late" / "checkpoints" / f"step_{step}", passes=passes)
        expected = tensors_of(tmp_path / "at_once" / "checkpoints" / f"step_{step}")
        assert found.pop("model.passes") == step, "what a pass changes is copied before the next one"
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), (step, name)


def test_a_run_that_ended_in_its_closing_evaluation_has_that_left_to_do(root, tmp_path):
    """Killed there, or signalled: the steps are done, and the `final` record is not there."""
    config = tiny_run(root, **BF16)
    assert train(config, tmp_path) == Outcome(3)
    records = read_metrics(tmp_path)
    (closing,) = [record for record in records if record["kind"] == "final"]
    left = [record for record in records if record["kind"] == "train"]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in left))
    resumed = tiny_run(root, resume=str(tmp_path), **BF16)
    for _ in range(2):  # the second time there is nothing to do
        assert train(resumed, tmp_path) == Outcome(3)
        (found,) = [record for record in read_metrics(tmp_path) if record["kind"] == "final"]
        assert found["validation_loss"] == closing["validation_loss"]
