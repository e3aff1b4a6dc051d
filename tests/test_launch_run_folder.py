"""A run's folder: where it lies, what it refuses, and a config.yaml that comes back as it went in."""

import time
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from octofold.backends.errors import UserError
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import (
    MANIFEST,
    checkpoints,
    has_checkpoint,
    make_run_folder,
    read_config,
    restore_config,
    schema_node,
    write_config,
)


@dataclass(frozen=True)
class Mapped:
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    mapped: Mapped = field(default_factory=Mapped)


def add_checkpoint(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return folder


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("\\${}a'\":# \n", max_size=12),
    path=st.none() | st.sampled_from(["null", "1e3", "0x10", "yes", "~", "2001-01-01", "a: b", "${a}", r"\${a}"]),
    lr=st.floats(0, 1e30),
    seed=st.integers(-(2**63), 2**63),
)
@settings(deadline=None, max_examples=60)
def test_the_saved_config_comes_back_as_it_went_in(tmp_path_factory, prompt, path, lr, seed):
    default = JobConfig()
    job = replace(
        default,
        data=replace(default.data, path=path),
        optim=replace(default.optim, lr=lr),
        train=replace(default.train, sample_prompt=prompt, seed=seed),
    )
    run_dir = tmp_path_factory.getbasetemp()
    write_config(run_dir, job)
    assert read_config(run_dir) == job


def test_a_mapping_takes_keys_that_its_default_lacks_and_the_schema_takes_none():
    node = schema_node(Job)
    OmegaConf.set_struct(node, True)  # as Hydra does before it applies overrides
    OmegaConf.update(node, "mapped.labels", {"team": "a"})
    assert OmegaConf.to_object(node) == Job(Mapped({"team": "a"}))
    with pytest.raises(ConfigAttributeError, match="lables"):
        OmegaConf.update(node, "mapped.lables", {"team": "a"})


def test_every_key_is_written(tmp_path):
    write_config(tmp_path, JobConfig())
    text = (tmp_path / "config.yaml").read_text()
    assert all(f"{section}:" in text for section in ("model", "data", "parallel", "optim", "launch"))
    assert "run_dir: null" in text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "no temporary file stays"


@pytest.mark.parametrize(
    "content",
    [b"train: [", b"train:\n  stepz: 3\n", b"train:\n  steps: many\n", b"- a\n", b"\xff\xfe\x00"],
)
def test_a_corrupt_config_is_the_users_to_mend(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)config\.yaml cannot be read.*remedy"):
        read_config(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path / "nowhere")


def test_the_default_folder_carries_name_and_time_and_is_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260102-030405")
    job = JobConfig(name="mine")
    made = [make_run_folder(job) for _ in range(3)]
    assert [path.name for path in made] == [f"mine-20260102-030405{end}" for end in ("", "-2", "-3")]
    assert all(path.is_absolute() and path.parent == tmp_path / "runs" for path in made)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\nb"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder's name"):
        make_run_folder(JobConfig(name=name))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_unless_resuming(tmp_path):
    job = JobConfig(run_dir=str(tmp_path / "run"))
    run_dir = make_run_folder(job)
    assert make_run_folder(job) == run_dir, "an empty folder is free"
    write_config(run_dir, job)
    with pytest.raises(UserError, match=r"resume="):
        make_run_folder(job)
    assert make_run_folder(job, resuming=True) == run_dir


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(UserError, match="cannot be made"):
            make_run_folder(JobConfig(run_dir=str(run_dir)))


def test_only_complete_checkpoints_count_in_the_order_of_their_steps(tmp_path):
    (tmp_path / "checkpoints" / "step_7").mkdir(parents=True)
    assert not has_checkpoint(tmp_path)
    ten, nine = add_checkpoint(tmp_path, 10), add_checkpoint(tmp_path, 9)
    assert checkpoints(tmp_path) == [nine, ten]


def test_the_checkpoint_marker_is_the_one_that_training_writes():
    from octofold.train.checkpoint.manifest import MANIFEST as WRITTEN

    assert MANIFEST == WRITTEN


def test_restoring_undoes_a_failed_attempt_but_never_strands_a_checkpoint(tmp_path):
    restore_config(tmp_path, write_config(tmp_path, JobConfig()))
    assert not (tmp_path / "config.yaml").exists()
    write_config(tmp_path, JobConfig(name="first"))
    restore_config(tmp_path, write_config(tmp_path, JobConfig(name="second")))
    assert read_config(tmp_path).name == "first"
    add_checkpoint(tmp_path, 1)
    restore_config(tmp_path, None)
    assert read_config(tmp_path).name == "first"


def test_restoring_finds_checkpoints_that_lie_elsewhere(tmp_path):
    add_checkpoint(tmp_path / "store", 1)
    write_config(tmp_path, JobConfig(name="first"))
    restore_config(tmp_path, None, str(tmp_path / "store" / "checkpoints"))
    assert read_config(tmp_path).name == "first"
