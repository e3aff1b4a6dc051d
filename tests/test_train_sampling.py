"""Text from a model: what the settings mean, and that the layout of the run does not matter."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.backends.errors import UserError
from octofold.train import sampling
from octofold.train.sampling import sample

EOS, PADDING = 256, 300
"""Of the byte tokenizer, whose 257 tokens are padded to 320 logits."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def trained(root: Path, ranks: Any) -> Path:
    """A run of two ranks that split the experts, in FP64, long enough to have learned some letters."""
    config = tiny_run(root, 2, parallel={"expert": 2}, train={"steps": 12}, optim={"lr": 5e-3})
    ranks(2).run(run_tasks.run, config, root / "trained")
    return root / "trained"


def write(trained: Path, root: Path, tmp_path: Path, *requests: dict[str, Any], **more: Any) -> list[str]:
    """The texts of one rank."""
    precision = {"name": more.pop("precision", "fp64")}
    config = tiny_run(root, precision=precision, resume=str(trained))
    texts, is_training = run_tasks.alone(run_tasks.write, config, tmp_path / "run", list(requests), *more.values())
    assert is_training
    return texts


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_greedy_is_deterministic_and_is_top_1(precision, trained, root, tmp_path):
    """BF16 logits tie often: the likeliest token and the only one of top-1 are the same all the same."""
    greedy, again, top_1, hot = write(
        trained,
        root,
        tmp_path,
        {},
        {"seed": 1},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 50.0, "top_k": 1, "seed": 3},
        precision=precision,
    )
    assert greedy == again == top_1 == hot
    assert greedy.startswith("the ")
    assert len(greedy) > len("the ")


def test_seed_and_temperature(trained, root, tmp_path):
    drawn = {"temperature": 1.0, "tokens": 24}
    first, second, other, cold = write(
        trained, root, tmp_path, drawn, drawn, {**drawn, "seed": 1}, {"temperature": 1e-6, "tokens": 12}
    )
    assert first == second != other
    assert cold == write(trained, root, tmp_path, {})[0]
    # More candidates than tokens are all the tokens.
    assert (
        write(trained, root, tmp_path, {**drawn, "top_k": 1000})[0]
        == write(trained, root, tmp_path, {**drawn, "top_k": 257})[0]
    )


def test_prompts_of_any_length(trained, root, tmp_path):
    """The model sees the last `context` tokens only; an empty prompt begins a document."""
    long = "seven experts share a token " * 9
    whole, end, empty, none = write(
        trained,
        root,
        tmp_path,
        {"prompt": long, "context": 16},
        {"prompt": long[-16:], "context": 16},
        {"prompt": ""},
        {"tokens": 0},
    )
    assert whole.removeprefix(long) == end.removeprefix(long[-16:])
    assert len(whole) > len(long)
    assert empty
    assert none == "the "


def test_end_of_text_ends_and_padding_is_never_drawn(trained, root, tmp_path):
    drawn = {"temperature": 1.0}
    assert write(trained, root, tmp_path, {}, drawn, favourite=(0, EOS)) == ["the ", "the "]
    assert write(trained, root, tmp_path, {}, drawn, favourite=(0, PADDING)) == write(
        trained, root, tmp_path, {}, drawn
    )


def test_sample_equals_what_the_trainer_writes(trained, root, ranks, tmp_path):
    """One rank reads the checkpoint of two: the same text, greedy and drawn."""
    requests = [{}, {"temperature": 0.9, "top_k": 20, "seed": 5, "tokens": 20}]
    config = tiny_run(root, 2, parallel={"expert": 2}, resume=str(trained))
    first, second = ranks(2).run(run_tasks.write, config, tmp_path / "run", requests)
    assert first == second
    greedy = sample(config, trained, "the ", tokens=12, temperature=0.0, top_k=0, seed=0)
    drawn = sample(config, trained, "the ", tokens=20, temperature=0.9, top_k=20, seed=5)
    assert [greedy, drawn] == first[0]


def test_room_for_gathered_weights_does_not_change_the_text(trained, root, monkeypatch):
    """With room they are cast once; without, layer by layer for every token."""
    config = tiny_run(root, precision={"name": "bf16"})
    settings: dict[str, Any] = {"tokens": 20, "temperature": 0.9, "top_k": 20, "seed": 5}
    roomy = sample(config, trained, "the ", **settings)
    monkeypatch.setattr(sampling, "rank_memory_bytes", lambda *_: 0)
    assert sample(config, trained, "the ", **settings) == roomy


def test_ranks_that_disagree_write_rank_0s_text(trained, root, ranks, tmp_path):
    """Rank 1 alone would end at once; it must not leave rank 0 waiting."""
    config = tiny_run(root, 2, parallel={"expert": 2}, resume=str(trained))
    agreeing = ranks(2).run(run_tasks.write, config, tmp_path / "run", [{}])
    assert ranks(2).run(run_tasks.write, config, tmp_path / "run", [{}], (1, EOS)) == agreeing


def test_run_without_tokenizer_or_checkpoint_is_refused(trained, root, tmp_path):
    config = tiny_run(root)
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run_dir / "tokenizer")
    with pytest.raises(UserError, match="run/tokenizer is missing"):
        sample(config, run_dir, "the ", tokens=1, temperature=0.0, top_k=0, seed=0)
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds no checkpoint"):
        sample(config, tmp_path, "the ", tokens=1, temperature=0.0, top_k=0, seed=0)
