"""Overrides become a typed job, and every mistake a message that names key, value, rule and remedy."""

import contextlib
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import UserError
from octofold.launch.compose import apply, compose, expand, keys_of, nearest, parse
from octofold.launch.config import JobConfig
from octofold.launch.sample import SampleJob


def test_defaults_groups_and_values_compose_into_frozen_dataclasses():
    job = compose(["experiment=quickstart", "train.steps=7", "parallel.expert=1", "data.path='/a b/é.txt'"])
    assert isinstance(job, JobConfig)
    assert (job.name, job.model.name, job.launch.nproc_per_node) == ("quickstart", "moe_10m", 2)
    assert (job.train.steps, job.parallel.expert, job.data.path) == (7, 1, "/a b/é.txt")
    assert compose([]).model.name == "tiny", "a composition leaves nothing behind for the next"


def test_interpolation_is_resolved():
    assert compose(["train.steps=30", "train.eval_every=${train.steps}"]).train.eval_every == 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.sample_prompt='a, b'", "a, b"),
        ('train.sample_prompt="x = {1: [2]}"', "x = {1: [2]}"),
        (r'train.sample_prompt="say \"hi\""', 'say "hi"'),
        ("train.sample_prompt=", ""),
        ("train.sample_prompt='日本語 é'", "日本語 é"),
        ("train.sample_prompt=12", "12"),
    ],
)
def test_text_values_follow_hydras_grammar(text, expected):
    assert compose([text]).train.sample_prompt == expected


MISTAKES = [
    ("train.stepz=5", "train.stepz=5", "no key train.stepz", "remedy: train.steps=5"),
    ("lr=1e-3", "lr=1e-3", "no key lr", "remedy: optim.lr=0.001"),
    ("model.n_routed_expert=4", "no key model.n_routed_expert", "remedy: model.n_routed_experts=4"),
    ("modle=tiny", "no key modle", "remedy: model=tiny"),
    ("zzqq=1", "no key zzqq", "keys start with one of: backend."),
    ("+train.zzqq=1", "no key train.zzqq", "keys start with one of"),
    ("model=tinny", "model=tinny", "moe_10m, octofold_1t, octofold_1t_tiny, tiny", "remedy: model=tiny"),
    ("experiment=quikstart", "remedy: experiment=quickstart"),
    ("model={hidden_size: 8}", "model is a group", "model=deepseek_v2"),
    ("model@data=tiny", "the group model is there already", "remedy: model=tiny"),
    ("+experiment=quickstart", "is there already", "remedy: experiment=quickstart"),
    ("train.steps=abc", "train.steps=abc", "a whole number", "remedy: train.steps=500"),
    ("train.steps=1.5", "a whole number"),
    ("train.steps=null", "a whole number"),
    ("train.steps=[1,2]", "a whole number"),
    ("++train.steps=x", "a whole number"),
    ("+train.steps=5", "is there already", "remedy: train.steps=5"),
    ("optim.lr=fast", "a number", "remedy: optim.lr=0.002"),
    ("optim.lr=nan", "nan is none"),
    ("train.wandb=maybe", "true or false", "remedy: train.wandb=false"),
    ("train.steps=???", "a value is missing", "remedy: train.steps=500"),
    ("~train.steps", "none can be removed"),
    ("train.steps=1,2", "several values make several jobs", "--multirun"),
    ("train.steps", "written key=value", "remedy: train.steps=VALUE"),
    ("quickstart", "written key=value", "remedy: experiment=quickstart"),
    ("data.path=/é", "Hydra's grammar", "'data.path=\"/é\"'"),
    ("data.path=a=b", "Hydra's grammar", "'data.path=\"a=b\"'"),
    ('data.path="a', "Hydra's grammar", "remedy: quote"),
    ("train.steps=${optim.lr}", "train.steps cannot be composed", "optim.lr"),
    ("train.steps=${nope}", "train.steps cannot be composed", "'nope' not found"),
    ("hydra.run.dir=x", "no effect here"),
    ("", "written key=value"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_is_named_with_rule_and_remedy(mistake):
    text, *parts = mistake
    with pytest.raises(UserError) as error:
        compose([text])
    message = str(error.value)
    assert all(part in message for part in [*parts, "rule:", "remedy:"]), message


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_any_text_is_either_an_override_or_a_user_error(text):
    with contextlib.suppress(UserError):
        assert len(parse([text])) == 1


@given(st.text("ab=,:{}[]()'\" ", min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_the_quoting_that_a_syntax_error_suggests_works(value):
    try:
        parse([f"data.path={value}"])
    except UserError as error:
        (suggested,) = shlex.split(str(error).partition("for the shell: ")[2])
        (override,) = parse([suggested])
        assert override.value() == value


def test_an_experiment_of_ones_own_is_found_and_its_mistakes_are_named(tmp_path):
    folder = tmp_path / "it's mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 3\n")
    (folder / "wrong.yaml").write_text("# @package _global_\ntrain:\n  stepz: 3\n")
    (folder / "broken.yaml").write_text("# @package _global_\ntrain: [\n")
    assert compose(["experiment=mine"], [str(folder.parent)]).train.steps == 3
    with pytest.raises(UserError, match=r"(?s)experiment/wrong.*write train\.steps"):
        compose(["experiment=wrong"], [str(folder.parent)])
    with pytest.raises(UserError, match="cannot be composed"):
        compose(["experiment=broken"], [str(folder.parent)])
    with pytest.raises(UserError, match="does not exist"):
        compose([], [str(tmp_path / "nowhere")])


def test_a_sweep_becomes_the_jobs_of_its_product():
    jobs = expand(["train.seed=0,1", "optim.lr=1e-3,2e-3", 'name="a,b"'])
    assert len(jobs) == 4
    assert [(j.train.seed, j.optim.lr, j.name) for j in map(compose, jobs)] == [
        (0, 1e-3, "a,b"),
        (0, 2e-3, "a,b"),
        (1, 1e-3, "a,b"),
        (1, 2e-3, "a,b"),
    ]
    assert [compose(job).model.name for job in expand(["model=glob([m*,t*])"])] == ["moe_10m", "tiny"]
    with pytest.raises(UserError, match="remedy"):
        expand(["optim.lr=interval(0,1)"])


def test_apply_sets_typed_values_on_a_saved_job_and_keeps_the_rest():
    saved = compose(["experiment=quickstart", r'train.sample_prompt="\${HOME} \\"'])
    changed = apply(saved, parse(["train.steps=9", "data.path=null"]))
    assert changed.train.steps == 9
    assert (changed.name, changed.train.sample_prompt) == ("quickstart", saved.train.sample_prompt)
    assert changed.train.sample_prompt.startswith("${HOME}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model=tiny", "the groups were chosen"),
        ("experiment=quickstart", "such as train.steps=VALUE"),
        ("train.steps=x", "a whole number"),
        ("train.stepz=1", "train.steps=1"),
        ("train.eval_every=${nope}", "train.eval_every cannot be composed"),
    ],
)
def test_apply_refuses_what_a_saved_job_cannot_take(text, part):
    with pytest.raises(UserError, match=part):
        apply(JobConfig(), parse([text]))


def test_sample_keys_are_typed_the_same_way():
    assert apply(SampleJob(), parse(["sample.tokens=3", "sample.temperature=0"])).sample.tokens == 3
    with pytest.raises(UserError, match=r"remedy: sample\.tokens=3"):
        apply(SampleJob(), parse(["sample.token=3"]))


def test_every_group_and_key_of_the_schema_has_a_home_in_the_groups_folder():
    configs = Path(__file__).parents[1] / "configs"
    groups = {path.name for path in configs.iterdir() if path.is_dir() and path.name != "__pycache__"}
    sections = {key.partition(".")[0] for key in keys_of(JobConfig) if "." in key}
    assert sections | {"experiment"} == groups


def test_nearest_finds_by_the_last_part_too():
    known = list(keys_of(JobConfig))
    assert nearest("steps", known) == "train.steps"
    assert nearest("data.lr", known) == "optim.lr"
    assert nearest("qqqq", known) is None
