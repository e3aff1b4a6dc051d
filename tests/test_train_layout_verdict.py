"""How a layout is held to one rank: what counts as a difference, which rank is told, which sentence it gets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.train.layout.diagnosis import describe, explain, group_of
from octofold.train.layout.facts import Arrays, RankFacts, StepFacts
from octofold.train.layout.verdict import Difference, Key, compare, ratio, told

NAMES = [
    "embed_tokens.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.input_layernorm.weight",
    "layers.0.mlp.gate.weight",
    "layers.0.mlp.experts.down_proj",
    "mtp.0.norm.weight",
    "lm_head.weight",
]
TOLERANCE = 1e-9


def gradients(seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(16) for name in NAMES}


def norm_of(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.square(a).sum() for a in arrays.values())))


def facts(rank: int = 0, given: Arrays | None = None, **changes: Any) -> RankFacts:
    """One step of a rank, with the report of its gradients."""
    arrays = gradients() if given is None else given
    report = {"loss": 2.0, "grad_norm": norm_of(gradients()), "tokens": 64, **changes.pop("report", {})}
    step: dict[str, Any] = {"loads": {}, "biases": {}, "own_tokens": 64, **changes}
    return RankFacts(rank, (StepFacts(report=report, gradients=arrays, **step),), {})


def differences(found: list[RankFacts], expected: RankFacts) -> list[Difference]:
    return compare(told(found), told([expected]), TOLERANCE)


def said(*found: RankFacts, expected: RankFacts | None = None, without: Arrays | None = None) -> str:
    expected = expected or facts()
    worst = differences(list(found), expected)
    return "; ".join(
        explain(found, expected, worst, TOLERANCE, lambda loss: without if loss.startswith("MTP") else None)
    )


def changed(name: str, value: Any) -> Arrays:
    arrays = gradients()
    arrays[name] = value(arrays[name]) if callable(value) else value
    return arrays


def test_equal_runs_differ_in_nothing():
    found = differences([facts(0), facts(1)], facts())
    assert {difference.error for difference in found} == {0.0}
    assert said(facts(0), facts(1)) == ""


def test_the_worst_comes_first_with_its_rank():
    arrays = changed("lm_head.weight", lambda g: g * (1 + 1e-3))
    worst, second, *rest = differences([facts(0), facts(1, arrays)], facts())
    assert (worst.key, worst.rank) == (Key("gradient", 1, "lm_head.weight"), 1)
    assert worst.error == pytest.approx(1e-3)
    assert worst.ratio == pytest.approx(1.001)
    assert second.error == 0
    assert rest


def test_what_is_missing_unknown_or_not_finite_is_infinitely_wrong():
    arrays = changed("lm_head.weight", lambda g: g * np.nan)
    del arrays["embed_tokens.weight"]
    arrays["layers.0.extra"] = np.ones(2)
    arrays["layers.0.mlp.gate.weight"] = np.ones((4, 4))
    notes = {d.key.name: d.note for d in differences([facts(0, arrays)], facts()) if d.error == float("inf")}
    assert notes == {
        "lm_head.weight": "not finite",
        "embed_tokens.weight": "missing on every rank",
        "layers.0.extra": "one rank knows nothing of it",
        "layers.0.mlp.gate.weight": "shape [4, 4], of one rank [16]",
    }


@given(st.floats(1e-22, 1e-17), st.integers(0, 99))
def test_a_gradient_that_is_rounding_is_not_compared_with_itself(size, seed):
    """Zero by theory, such as a gate's whose only expert has weight 1: both runs round, each in its own way."""
    noise = np.random.default_rng(seed).standard_normal((2, 16)) * size
    found = facts(0, changed("layers.0.mlp.gate.weight", noise[0]))
    expected = facts(0, changed("layers.0.mlp.gate.weight", noise[1]))
    assert differences([found], expected)[0].error < TOLERANCE


@given(st.floats(1e-13, 1.0))
def test_a_small_gradient_that_is_lost_is_seen(size):
    expected = facts(0, changed("layers.0.mlp.gate.weight", lambda g: g * size))
    found = facts(0, changed("layers.0.mlp.gate.weight", np.zeros(16)))
    worst = differences([found], expected)[0]
    assert (worst.key.name, worst.note) == ("layers.0.mlp.gate.weight", "zero")
    assert worst.error > TOLERANCE


def test_zero_against_zero_is_equal():
    zero = facts(0, {name: np.zeros(4) for name in NAMES})
    assert differences([zero], zero)[0].error == 0
    assert np.isnan(ratio(np.ones(4), np.zeros(4)))


EXPERTS, HEAD = "layers.0.mlp.experts.down_proj", "lm_head.weight"
UNEVEN = np.linspace(0.2, 0.9, 16)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (changed(EXPERTS, lambda g: 2 * g), f"gradients of {EXPERTS} are 2x those of one rank: summed once too often"),
        (changed(EXPERTS, lambda g: g / 4), f"gradients of {EXPERTS} are 0.25x those of one rank: not summed over all"),
        ({name: 4 * g for name, g in gradients().items()}, "gradients of all parameters are 4x those of one rank"),
        (
            changed(EXPERTS, lambda g: g * UNEVEN),
            "gradients of all expert weights, and of nothing else, are uneven",
        ),
        (changed("mtp.0.norm.weight", np.zeros(16)), "mtp.0.norm.weight gradients are missing"),
        ({**changed(HEAD, lambda g: g + UNEVEN), **changed(EXPERTS, lambda g: g * UNEVEN)}, "all expert weights"),
    ],
)
def test_a_fault_has_its_sentence(found, sentence):
    assert sentence in said(facts(0, found))


def test_losses_that_are_lost_in_part_or_whole():
    rest = gradients()
    own = np.random.default_rng(3).standard_normal(16)
    rest[HEAD] = rest[HEAD] - own
    lost = changed(HEAD, lambda g: g - own)
    assert said(facts(0, lost), without=rest) == f"MTP losses are missing in the gradients of {HEAD}"
    twice = changed(HEAD, lambda g: g + own)
    assert said(facts(0, twice), without=rest) == f"MTP losses are counted 2x in the gradients of {HEAD}"


def test_copies_that_disagree():
    sentence = said(facts(0, changed(HEAD, lambda g: g * UNEVEN)), facts(1, changed(HEAD, lambda g: g * (1 - UNEVEN))))
    assert sentence == f"copies of {HEAD} have different gradients: not summed over the ranks that copy"


def test_a_norm_that_counts_twice():
    squares = {name: float(np.square(g).sum()) for name, g in gradients().items()}
    found = facts(0, report={"grad_norm": np.sqrt(sum(squares.values()) + squares[EXPERTS])})
    assert said(found) == "gradients are right, and the norm counts expert weights 2x"
    found = facts(0, report={"grad_norm": 2 * np.sqrt(sum(squares.values()))})
    assert said(found) == "gradients are right, and the norm counts parameters 4x"
    assert "the norm is 1.1x theirs" in said(facts(0, report={"grad_norm": 1.1 * norm_of(gradients())}))


def test_a_loss_that_is_divided_by_local_tokens():
    found = [facts(rank, report={"loss": 4.1}, own_tokens=tokens) for rank, tokens in enumerate((30, 34))]
    assert "tokens_global/tokens_local is 1.88 to 2.13: ranks divide by their own valid tokens" in said(*found)
    found = [facts(rank, report={"loss": 2.01}, own_tokens=tokens) for rank, tokens in enumerate((30, 34))]
    assert "own valid tokens and took the mean" in said(*found)
    assert said(facts(0, report={"loss": 3.0})) == "loss is off by the factor 1.5"


def test_a_bias_that_moved_by_local_counts():
    loads = [np.array([9, 1, 1, 1]), np.array([0, 6, 3, 3])]
    total = {1: sum(loads)}
    right = {1: 0.1 * np.sign(total[1].mean() - total[1])}
    expected = facts(0, loads=total, biases=right)
    moved = [0.1 * np.sign(own.mean() - own) for own in loads]
    found = [facts(rank, loads={1: loads[rank]}, biases={1: moved[rank]}) for rank in range(2)]
    assert said(*found, expected=expected) == "expert bias of layer 1 moved by local counts"
    other = facts(0, loads={1: loads[0]}, biases={1: right[1] * 2})
    assert "moved otherwise than by the counts" in said(other, expected=expected)


def test_what_is_wrong_later_says_so():
    expected = facts()
    two = replace(expected, steps=expected.steps * 2, weights={HEAD: np.ones(4)})
    found = replace(two, steps=(expected.steps[0], facts(0, changed(HEAD, lambda g: 3 * g)).steps[0]))
    assert said(found, expected=two).startswith("steps before step 2 are right; gradients of lm_head.weight are 3x")
    assert said(replace(two, weights={HEAD: np.zeros(4)}), expected=two).endswith("the update itself")


def test_groups_and_their_names():
    assert [group_of(name) for name in NAMES[:5]] == [
        "embedding",
        "attention weights",
        "norm weights",
        "gates",
        "expert weights",
    ]
    assert describe(NAMES, NAMES) == "all parameters"
    assert describe([EXPERTS, "layers.0.mlp.gate.weight"], NAMES) == "all expert weights and gates"
    assert describe([HEAD], NAMES) == HEAD
