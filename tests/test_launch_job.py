"""What `octofold train` settles on: new jobs proved by every rule, and saved runs continued or refused."""

from dataclasses import asdict, replace

import pytest

from octofold.backends.errors import UserError
from octofold.launch.compose import compose
from octofold.launch.job import settle
from octofold.launch.run_folder import MANIFEST, write_config
from octofold.train.checkpoint.manifest import Manifest
from octofold.train.config import validate


@pytest.fixture(scope="module")
def job():
    return validate(compose(["name=saved", "train.steps=10", "train.seed=3"]), 1)


@pytest.fixture
def run_dir(job, tmp_path):
    """A run of one rank that stopped after step 5, and after step 10."""
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
        (["launch.name=pbs"], ["launch=local"]),
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


STARTS = {"named": ["resume={run}"], "auto": ["resume=auto", "run_dir={run}", "train.seed=3"]}


@pytest.mark.parametrize("start", STARTS)
def test_a_changed_course_is_refused_as_a_whole(start, run_dir):
    """By name or not, the same rule; every difference is listed, those that are refused first."""
    asked = [text.replace("{run}", str(run_dir)) for text in STARTS[start]]
    with pytest.raises(UserError) as error:
        settle([*asked, "train.seed=4", "optim.lr=1e-3", "train.steps=20", "train.log_every=1"])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{run_dir} was saved with other values"
    assert {*lines[1:3]} == {
        "  train.seed: 3 -> 4  (changes the course)",
        "  optim.lr: 0.002 -> 0.001  (changes the course)",
    }
    assert "  train.steps: 10 -> 20  (the run, and its schedule, end elsewhere)" in lines
    assert "  train.log_every: 10 -> 1  (changes nothing of the course)" in lines
    assert "resume_allow=[" in lines[-1]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("allowed", ["[optim.lr,train.seed]", "[optim.*,train.*]"])
def test_a_changed_course_may_be_allowed_by_name(start, allowed, run_dir):
    asked = [text.replace("{run}", str(run_dir)) for text in STARTS[start]]
    job = settle([*asked, "train.seed=4", "optim.lr=1e-3", f"resume_allow={allowed}"])
    assert (job.config.optim.lr, job.config.train.seed) == (1e-3, 4)
    assert {"optim.lr: 0.002 -> 0.001", "train.seed: 3 -> 4"} <= {*map(str, job.changes)}
    # What was allowed once is not allowed for ever.
    write_config(run_dir, job.config)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.003"):
        settle([f"resume={run_dir}", "optim.lr=3e-3"])
    assert settle([f"resume={run_dir}"]).changes == ()


def test_another_model_is_refused_whatever_is_allowed(run_dir):
    with pytest.raises(UserError) as error:
        settle([f"resume={run_dir}", "model.hidden_size=96", "resume_allow=[model.*]"])
    assert "makes it another model" in str(error.value)
    assert "allow them" not in str(error.value)


def test_a_layout_is_free(run_dir):
    job = settle([f"resume={run_dir}", "launch.nproc_per_node=4", "parallel.expert=2", "train.micro_batch_size=2"])
    assert job.config.parallel.data_shard == 4
    assert {change.effect for change in job.changes} == {"none", "rounding"}


def test_imported_weights_have_no_course_yet(run_dir):
    for step in (5, 10):
        (run_dir / "checkpoints" / f"step_{step}").rename(run_dir / "checkpoints" / "step_0")
        (run_dir / "checkpoints" / "step_0" / MANIFEST).unlink()
        (run_dir / "checkpoints" / "step_0").rmdir()
    (run_dir / "checkpoints" / "step_0").mkdir()
    (run_dir / "checkpoints" / "step_0" / MANIFEST).write_text("{}")
    assert settle([f"resume={run_dir}", "optim.lr=1e-3"]).config.optim.lr == 1e-3
    with pytest.raises(UserError, match="another model"):
        settle([f"resume={run_dir}", "model.hidden_size=96"])


def test_an_unknown_name_is_not_allowed(run_dir):
    with pytest.raises(UserError, match=r"resume_allow=optim\.lrr"):
        settle([f"resume={run_dir}", "resume_allow=[optim.lrr]"])


def publish(checkpoints, step, saved_at_s, **made_by):
    """A valid checkpoint that holds no tensor."""
    folder = checkpoints / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(Manifest({"step": step}, {}, made_by, saved_at_s).sealed())


def test_latest_is_the_run_that_saved_last(job, tmp_path, monkeypatch):
    """Whatever its step, and whenever it began; what lies in runs/ without a valid checkpoint does not count."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run in .*/runs has saved a checkpoint"):
        settle(["resume=latest"])
    for name in ("older", "younger", "damaged", "empty", "elsewhere"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_config(tmp_path / "runs" / name, replace(job, run_dir=str(tmp_path / "runs" / name)))
    (tmp_path / "runs" / "damaged" / "checkpoints" / "step_7").mkdir(parents=True)
    (tmp_path / "runs" / "damaged" / "checkpoints" / "step_7" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"(?s)is valid\n.*damaged/checkpoints/step_7/manifest.json cannot be read"):
        settle(["resume=latest"])
    publish(tmp_path / "runs" / "older" / "checkpoints", 9, 1000.0)
    publish(tmp_path / "runs" / "younger" / "checkpoints", 2, 2000.0)
    latest = settle(["resume=latest", "train.log_every=1"])
    assert (latest.config.run_dir, latest.asked, latest.reuse_folder) == (
        str(tmp_path / "runs" / "younger"),
        "latest",
        True,
    )


def test_a_checkpoint_is_held_to_the_values_it_was_saved_with(job, tmp_path):
    """Not to those of a start that was allowed a change and saved nothing, nor to those of a later checkpoint."""
    run = tmp_path / "run"
    for step, lr in ((5, 1e-3), (10, 2e-3)):
        config = asdict(replace(job, run_dir=str(run), optim=replace(job.optim, lr=lr, weight_decay=0.0)))
        publish(run / "checkpoints", step, float(step), config=config | {"a_key_of_yesterday": 1})
    write_config(run, replace(job, run_dir=str(run), optim=replace(job.optim, lr=3e-3, weight_decay=0.0)))
    with pytest.raises(UserError, match=r"(?s)optim\.lr: 0\.002 -> 0\.003.*as they were: optim\.lr=0\.002"):
        settle([f"resume={run}"])
    assert [*map(str, settle([f"resume={run}", "resume_allow=[optim.lr]"]).changes)] == ["optim.lr: 0.002 -> 0.003"]
    assert settle([f"resume={run}", "optim.lr=2e-3"]).changes == ()
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.002"):
        settle([f"resume={run}/checkpoints/step_5", "optim.lr=2e-3"])
    assert settle([f"resume={run}/checkpoints/step_5", "optim.lr=1e-3"]).changes == ()


@pytest.mark.parametrize("config", [None, {"optim": {"lr": "fast"}}, {"optim": None}])
def test_a_checkpoint_that_does_not_tell_its_values_is_held_to_the_runs(job, tmp_path, config):
    publish(tmp_path / "checkpoints", 5, 1.0, **({} if config is None else {"config": config}))
    write_config(tmp_path, replace(job, run_dir=str(tmp_path)))
    assert settle([f"resume={tmp_path}"]).changes == ()
    with pytest.raises(UserError, match=r"optim\.lr: 0\.002 -> 0\.003"):
        settle([f"resume={tmp_path}", "optim.lr=3e-3"])


def test_checkpoints_elsewhere_are_found(job, tmp_path, monkeypatch):
    """With checkpoint.dir: by auto, by the run's name, and by a step."""
    monkeypatch.chdir(tmp_path)
    texts = ["resume=auto", f"run_dir={tmp_path / 'run'}", "checkpoint.dir=store", "train.seed=3"]
    assert settle(texts).config.resume is None
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", settle(texts).config)
    for step in (5, 10):
        publish(tmp_path / "store", step, float(step))
    assert settle(texts).config.resume == str(tmp_path / "store")
    assert settle([f"resume={tmp_path / 'run'}"]).config.resume == str(tmp_path / "store")
    named = settle([f"resume={tmp_path / 'run'}/checkpoints/step_5"]).config
    assert (named.run_dir, named.resume) == (str(tmp_path / "run"), str(tmp_path / "store" / "step_5"))


def test_a_run_that_is_to_save_elsewhere_goes_on_from_where_it_saved(job, tmp_path):
    """With resume=auto it began anew in silence, or took what lay in the other place for its own."""
    run, store = tmp_path / "run", tmp_path / "store"
    auto = ["resume=auto", f"run_dir={run}", "train.seed=3"]
    publish(run / "checkpoints", 5, 1.0)
    write_config(run, replace(job, run_dir=str(run)))
    changed = settle([*auto, f"checkpoint.dir={store}"])
    assert (changed.config.resume, changed.config.checkpoint.dir) == (str(run), str(store))
    assert f"checkpoint.dir: null -> {store}" in map(str, changed.changes)
    # Ended before it saved there.
    write_config(run, changed.config)
    assert settle([*auto, f"checkpoint.dir={store}"]).config.resume == str(run)
    assert settle([f"resume={run}"]).config.resume == str(run)
    publish(store, 10, 2.0)
    for texts in ([*auto, f"checkpoint.dir={store}"], auto, [f"resume={run}"]):
        assert settle(texts).config.resume == str(store), "also where checkpoint.dir is left out again"


def test_paths_of_data_are_kept_absolute(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    data = settle(["data=text", "data.path=corpus", "data.cache_dir=cache"]).config.data
    assert (data.path, data.cache_dir) == (str(tmp_path / "corpus"), str(tmp_path / "cache"))
