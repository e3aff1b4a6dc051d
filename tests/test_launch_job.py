"""What `octofold train` settles on: new jobs proved by every rule, and saved runs continued or refused."""

from dataclasses import replace

import pytest

from octofold.backends.errors import UserError
from octofold.launch.compose import compose
from octofold.launch.job import settle
from octofold.launch.run_folder import MANIFEST, write_config
from octofold.train.config import validate


@pytest.fixture
def run_dir(tmp_path):
    """A run of one rank that stopped after step 5, and after step 10."""
    job = validate(compose(["name=saved", "train.steps=10", "train.seed=3"]), 1)
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step}" / MANIFEST).write_text("{}")
    write_config(tmp_path, replace(job, run_dir=str(tmp_path)))
    return tmp_path


def test_a_new_job_is_resolved_for_its_ranks():
    job = settle(["launch.nproc_per_node=2", "parallel.expert=2"])
    assert (job.config.parallel.data_shard, job.config.resume, job.reuse_folder) == (2, None, False)


def test_a_launcher_decides_the_number_of_ranks():
    texts = ["launch.nproc_per_node=3", "train.global_batch_size=16"]
    assert settle(texts, world_size=4).config.parallel.data_shard == 4


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["parallel.data_shard=3"], ["parallel.data_shard=3", "= 3, but the job has 1 rank"]),
        (["train.global_batch_size=7"], ["train.global_batch_size=7", "train.micro_batch_size=4", "remedy"]),
        (["launch.nproc_per_node=2", "parallel.expert=3"], ["parallel.expert=3", "must divide"]),
        (["data=text", "data.path=/no/such"], ["data.path=/no/such", "no file matches"]),
        (["launch.nproc_per_node=0"], ["at least one rank"]),
        (["launch.stop_deadline_s=-1"], ["launch.stop_deadline_s=-1"]),
        (["launch.name=slurm"], ["launch=local"]),
        (["model.num_experts_per_tok=99"], ["cannot choose more experts"]),
        (["resume=auto"], ["add run_dir=FOLDER"]),
        (["resume=/no/such"], ["holds no run"]),
    ],
)
def test_rules_that_bind_several_keys_name_them(texts, parts):
    with pytest.raises(UserError) as error:
        settle(texts)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_named_run_goes_on_with_the_values_given(run_dir):
    job = settle([f"resume={run_dir}", "train.steps=20"])
    assert job.reuse_folder
    assert (job.config.train.steps, job.config.train.seed, job.config.name) == (20, 3, "saved")
    assert (job.config.run_dir, job.config.resume) == (str(run_dir), str(run_dir))


def test_a_moved_run_goes_on_where_it_lies_now(run_dir):
    moved = run_dir.rename(run_dir.with_name("moved ü"))
    assert settle([f"resume='{moved}'"]).config.run_dir == str(moved)


def test_a_named_checkpoint_is_continued(run_dir):
    config = settle([f"resume={run_dir}/checkpoints/step_5/"]).config
    assert (config.run_dir, config.resume) == (str(run_dir), f"{run_dir}/checkpoints/step_5")


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["resume={run}/checkpoints/step_7"], "step_5, step_10"),
        (["resume={run}", "model=tiny"], "the groups were chosen"),
        (["resume={run}", "experiment=quickstart"], "single values"),
        (["resume={run}", "train.stepz=3"], "remedy: train.steps=3"),
        (["resume={run}", "train.steps=x"], "a whole number"),
        (["resume={run}", "run_dir=/elsewhere"], "stays in its folder"),
        (["resume={run}", "train.global_batch_size=6"], "multiple of micro batch"),
    ],
)
def test_a_named_run_refuses_what_cannot_be(run_dir, texts, part):
    with pytest.raises(UserError, match=part):
        settle([text.replace("{run}", str(run_dir)) for text in texts])


def test_a_run_without_a_checkpoint_is_pointed_to_starting_over(tmp_path):
    write_config(tmp_path, compose([]))
    with pytest.raises(UserError, match="resume=auto"):
        settle([f"resume={tmp_path}"])


def test_auto_begins_where_nothing_is_saved_and_goes_on_where_something_is(run_dir, tmp_path_factory):
    fresh = settle(["resume=auto", f"run_dir={tmp_path_factory.mktemp('fresh')}"])
    assert (fresh.config.resume, fresh.reuse_folder) == (None, True)
    texts = ["resume=auto", f"run_dir={run_dir}", "name=other", "train.steps=12", "train.seed=3", "train.log_every=1"]
    again = settle([*texts, "model=tiny"])
    assert (again.config.resume, again.config.train.steps, again.reuse_folder) == (str(run_dir), 12, True)


def test_auto_lists_every_difference_from_the_saved_run(run_dir):
    with pytest.raises(UserError) as error:
        settle(["resume=auto", f"run_dir={run_dir}", "train.seed=4", "optim.lr=1e-3"])
    assert "train.seed=4 (saved: 3)" in str(error.value)
    assert "optim.lr=0.001 (saved: 0.002)" in str(error.value)
    assert "train.steps" not in str(error.value)


def test_paths_of_data_are_kept_absolute(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    data = settle(["data=text", "data.path=corpus", "data.cache_dir=cache"]).config.data
    assert (data.path, data.cache_dir) == (str(tmp_path / "corpus"), str(tmp_path / "cache"))
