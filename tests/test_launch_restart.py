"""What another attempt continues from: what this job has saved, never what it found and did not choose."""

from dataclasses import replace

import pytest

from octofold.backends.errors import UserError
from octofold.launch import train
from octofold.launch.config import JobConfig
from octofold.launch.restart import after_restart, has_saved, leave_mistake, mark_start, restarts
from octofold.launch.run_folder import read_config
from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.manifest import write_manifest


def save(checkpoints, step):
    (checkpoints / f"step_{step}").mkdir(parents=True, exist_ok=True)
    write_manifest(folder_at(checkpoints / f"step_{step}"), {"step": step})


@pytest.fixture
def job(tmp_path):
    return JobConfig(run_dir=str(tmp_path))


def test_a_job_that_has_saved_nothing_begins_anew(job, tmp_path):
    mark_start(tmp_path, job)
    assert after_restart(job, tmp_path).resume is None


def test_a_job_goes_on_from_what_it_saved(job, tmp_path):
    mark_start(tmp_path, job)
    save(tmp_path / "checkpoints", 4)
    assert after_restart(job, tmp_path).resume == str(tmp_path)


def test_a_job_that_chose_an_older_checkpoint_returns_to_it_until_it_saves(job, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 5)
    save(checkpoints, 10)
    job = replace(job, resume=str(checkpoints / "step_5"))
    mark_start(tmp_path, job)
    assert after_restart(job, tmp_path) == job
    (checkpoints / "step_10").rename(checkpoints / "step_10.left_at_8")
    save(checkpoints, 8)
    assert after_restart(job, tmp_path).resume == str(tmp_path)
    save(checkpoints, 10)
    assert after_restart(job, tmp_path).resume == str(tmp_path), "the same step of another course"


def test_checkpoints_that_lie_elsewhere_are_found(job, tmp_path):
    elsewhere = tmp_path / "store"
    job = replace(job, checkpoint=replace(job.checkpoint, dir=str(elsewhere)))
    mark_start(tmp_path, job)
    assert after_restart(job, tmp_path).resume is None
    save(elsewhere, 4)
    assert after_restart(job, tmp_path).resume == str(elsewhere)


def test_a_damaged_checkpoint_is_not_left_behind_without_a_word(job, tmp_path):
    """Loading it says what is wrong, where to begin anew would say nothing."""
    mark_start(tmp_path, job)
    save(tmp_path / "checkpoints", 4)
    (tmp_path / "checkpoints" / "step_4" / "manifest.json").write_text("{")
    assert after_restart(job, tmp_path).resume == str(tmp_path)


def test_a_checkpoint_that_was_never_finished_is_nothing_saved(job, tmp_path):
    mark_start(tmp_path, job)
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_4" / "shard-00001-of-00001.safetensors").write_bytes(b"half")
    assert after_restart(job, tmp_path).resume is None


def test_a_users_mistake_is_told_at_once(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job/7")
    mark_start(tmp_path, job)
    leave_mistake(tmp_path, UserError("no agent starts anything again"))
    assert after_restart(job, tmp_path) == job
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    leave_mistake(tmp_path, UserError("the shelf is empty"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarts() == 1
    with pytest.raises(UserError, match="the shelf is empty"):
        after_restart(job, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert after_restart(job, tmp_path) == job


@pytest.mark.parametrize("directory", [None, "store"])
def test_a_job_that_saved_keeps_its_configuration_whatever_ends_it(job, tmp_path, monkeypatch, directory):
    """A start that saved nothing leaves no trace; after one that did, its checkpoints are of its config.yaml."""
    place = tmp_path / (directory or "checkpoints")
    checkpoint = replace(job.checkpoint, dir=directory and str(place))
    job, saves = replace(job, checkpoint=checkpoint), []

    def ends_by_a_mistake(config, run_dir):
        for step in saves:
            save(place, step)
        raise UserError("the shelf is full")

    def start(steps):
        with pytest.raises(UserError, match="shelf"):
            train._run_locked(replace(job, train=replace(job.train, steps=steps)), tmp_path, in_process=True)

    monkeypatch.setattr(train, "_train_here", ends_by_a_mistake)
    start(10)
    assert not (tmp_path / "config.yaml").exists()
    saves.append(4)
    start(20)
    assert read_config(tmp_path).train.steps == 20
    saves.clear()
    start(30)
    assert read_config(tmp_path).train.steps == 20
    saves.append(8)
    start(40)
    assert read_config(tmp_path).train.steps == 40


def test_a_place_out_of_reach_may_hold_what_was_saved(job, tmp_path):
    assert not has_saved(tmp_path, job)
    save(tmp_path / "checkpoints", 4)
    assert has_saved(tmp_path, job), "nothing is known of how it began"
