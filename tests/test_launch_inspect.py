"""`octofold inspect`: what it tells of a run's checkpoints, and its exit status."""

import shutil
from pathlib import Path

import pytest
from run_configs import tiny_run, write_corpus

from octofold.launch.cli import main
from octofold.launch.config import JobConfig
from octofold.launch.inspect import size
from octofold.launch.run_folder import write_config
from octofold.train.main import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    root = write_corpus(tmp_path_factory.mktemp("inspect"))
    config = tiny_run(root, train={"steps": 2}, checkpoint={"every_steps": 1}, precision={"name": "bf16"})
    train(config, root / "run")
    write_config(root / "run", JobConfig(**vars(config)))
    return root / "run"


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run(trained, capsys):
    assert main(["inspect", str(trained), "--verify"]) == 0
    told = capsys.readouterr().out
    assert f"checkpoint {trained}/checkpoints/step_2" in told
    for text in ("step       2, 2 updates applied", "layout     1 ranks", "older      step_1", "loader: {"):
        assert text in told
    assert "verified   every byte is as it was written" in told


def test_a_checkpoint_with_its_tensors_and_config(trained, capsys):
    assert main(["inspect", str(trained / "checkpoints" / "step_1"), "--tensors", "--config"]) == 0
    told = capsys.readouterr().out
    assert "  model.layers.1.mlp.experts.gate_up_proj  float32 [8, 2, 32, 64]  in 1 part" in told
    assert '"n_routed_experts": 8' in told


def test_what_is_not_valid_is_told(run_dir, capsys):
    (shard,) = (run_dir / "checkpoints" / "step_2").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(run_dir)]) == 0  # sizes are right
    assert main(["inspect", str(run_dir), "--verify"]) == 1
    assert f"not valid  {shard} cannot be read" in capsys.readouterr().out
    shard.unlink()
    assert main(["inspect", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert f"not valid  step_2: {shard} is missing" in told
    assert "step_1 is the newest that is valid." in told
    assert main(["inspect", str(run_dir / "checkpoints" / "step_2")]) == 1


def test_a_place_without_checkpoints_is_the_users_mistake(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["inspect"]) == 2
    assert "remedy: octofold inspect RUN" in capsys.readouterr().err


def test_sizes():
    assert [size(n) for n in (0, 999, 1000, 123_456_789, 7.2e12)] == ["0 B", "999 B", "1.00 KB", "123.46 MB", "7.20 TB"]
