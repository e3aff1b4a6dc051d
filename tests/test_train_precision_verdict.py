"""The statistics of a precision verification on curves whose difference is known."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.train.precision.verdict import (
    CONFIDENCE,
    Curves,
    Interval,
    counted,
    interval,
    judge,
    least_steps,
    relative_error,
    smooth,
    t_quantile,
)

BAR, SMOOTHING, REPEATS = 0.0025, 0.9, 200
FALSE_AT_MOST = (1 - CONFIDENCE) + 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / REPEATS)
"""Share of false answers among the repeats, three standard deviations above what the confidence level says."""


def wandering(count: int, steps: int, *, correlation: float, spread: float, seed: int) -> np.ndarray:
    """[count, steps]: stationary AR(1) series of standard deviation `spread`."""
    rng = np.random.default_rng(seed)
    series = np.empty((count, steps))
    now = rng.normal(size=count)
    for step in range(steps):
        now = correlation * now + math.sqrt(1 - correlation**2) * rng.normal(size=count)
        series[:, step] = now
    return spread * series


def falling(steps: int, seed: int) -> np.ndarray:
    """A loss that falls, with the noise of its batches, which all runs of a seed share."""
    rng = np.random.default_rng(seed)
    return 2.0 + 4.0 * np.exp(-np.arange(steps) / 100) + 0.1 * rng.normal(size=steps)


def pairs(count: int, steps: int, *, difference: float, correlation: float, spread: float) -> list[Curves]:
    """One seed's curves, `count` times: FP8's loss is relatively higher by `difference`, and both pairs wander."""
    noise = wandering(2 * count, steps, correlation=correlation, spread=spread, seed=1)
    made = []
    for number in range(count):
        bf16 = falling(steps, number)
        again, fp8 = noise[2 * number : 2 * number + 2]
        made.append(Curves(fp8=bf16 * (1 + difference + fp8), bf16=bf16, bf16_again=bf16 * (1 + again)))
    return made


def answers(curves: list[Curves]) -> list[str]:
    return [judge([one], bar=BAR, smoothing=SMOOTHING).answer for one in curves]


def test_smoothing_is_the_average_with_weights_that_fall_by_the_coefficient():
    losses = falling(50, 0)
    weights = 0.9 ** np.arange(50)[::-1]
    assert smooth(losses, 0.9)[-1] == pytest.approx((weights * losses).sum() / weights.sum())
    assert smooth(losses, 0.9)[0] == losses[0]
    assert np.array_equal(smooth(losses, 0.0), losses)


@given(st.floats(-0.5, 0.5), st.floats(0.0, 0.99), st.integers(1, 60))
def test_a_relative_difference_stays_what_it_is(difference, smoothing, steps):
    bf16 = falling(steps, 0)
    error = relative_error(bf16 * (1 + difference), bf16, smoothing)
    np.testing.assert_allclose(error, difference, atol=1e-12)


@pytest.mark.parametrize(("degrees", "t"), [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)])
def test_students_t_is_that_of_the_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, rel=0.03 if degrees < 3 else 0.005)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.97])
def test_the_interval_holds_the_truth_as_often_as_it_says(correlation):
    series = wandering(REPEATS, 480, correlation=correlation, spread=1.0, seed=0)
    found = [interval([smooth(one, SMOOTHING)], SMOOTHING) for one in series]
    assert np.mean([one.gap > 0 for one in found]) <= FALSE_AT_MOST


def test_seeds_that_lie_apart_widen_the_interval():
    """What differs from seed to seed does not average out within one."""
    offsets = np.random.default_rng(0).normal(size=(REPEATS, 4))
    noise = wandering(REPEATS * 4, 300, correlation=0.5, spread=0.1, seed=0).reshape(REPEATS, 4, 300)
    found = [interval(list(offsets[i][:, None] + noise[i]), SMOOTHING) for i in range(REPEATS)]
    assert np.mean([one.gap > 0 for one in found]) <= FALSE_AT_MOST


@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_beyond_the_bar_is_no_and_never_yes(correlation, sign):
    far = answers(pairs(50, 600, difference=sign * 4 * BAR, correlation=correlation, spread=BAR))
    assert set(far) <= {"no", "inconclusive"}
    assert far.count("no") >= 45
    at_the_bar = answers(pairs(REPEATS, 600, difference=sign * 1.01 * BAR, correlation=correlation, spread=BAR))
    assert at_the_bar.count("yes") / REPEATS <= FALSE_AT_MOST


@pytest.mark.parametrize(("correlation", "yes_share"), [(0.5, 0.95), (0.9, 0.9), (0.97, 0.4)])
def test_no_difference_is_never_no_and_yes_where_the_noise_allows(correlation, yes_share):
    quiet = answers(pairs(REPEATS, 600, difference=0.0, correlation=correlation, spread=0.3 * BAR))
    assert quiet.count("no") == 0
    assert quiet.count("yes") >= yes_share * REPEATS
    loud = answers(pairs(REPEATS, 600, difference=0.0, correlation=correlation, spread=10 * BAR))
    assert loud.count("no") / REPEATS <= FALSE_AT_MOST


def test_a_difference_below_the_noise_floor_is_no_result():
    """Beyond the bar, but so are two BF16 runs from one another."""
    for one in pairs(REPEATS, 600, difference=2 * BAR, correlation=0.9, spread=20 * BAR):
        verdict = judge([one], bar=BAR, smoothing=SMOOTHING)
        assert verdict.floor is not None
        assert verdict.error is not None
        if verdict.floor.reach > abs(verdict.error.mean):
            assert verdict.answer == "inconclusive"
        if verdict.floor.reach > BAR:
            assert verdict.answer != "yes"


def test_fp8_that_drifts_away_is_no():
    (curves,) = pairs(1, 600, difference=0.0, correlation=0.5, spread=0.1 * BAR)
    drifting = replace(curves, fp8=curves.fp8 * (1 + 0.1 * np.linspace(0, 1, 600)))
    assert judge([drifting], bar=BAR, smoothing=SMOOTHING).answer == "no"


@pytest.mark.parametrize("key", ["steps", "seeds"])
def test_the_length_that_an_inconclusive_answer_names_tells(key):
    named = []
    for one in pairs(20, 400, difference=0.0, correlation=0.5, spread=3 * BAR):
        verdict = judge([one], bar=BAR, smoothing=SMOOTHING)
        if verdict.answer == "inconclusive":
            found = re.search(rf"verify\.{key}=(\d+)", verdict.reason)
            assert found, verdict.reason
            named.append(int(found[1]))
    length = int(np.median(named))
    if key == "steps":
        then = answers(pairs(20, length, difference=0.0, correlation=0.5, spread=3 * BAR))
    else:
        made = pairs(20 * length, 400, difference=0.0, correlation=0.5, spread=3 * BAR)
        groups = [made[i::20] for i in range(20)]
        then = [judge(group, bar=BAR, smoothing=SMOOTHING).answer for group in groups]
    assert then.count("yes") >= 10


def test_a_difference_at_the_bar_promises_nothing():
    noise = wandering(2, 600, correlation=0.5, spread=BAR, seed=0)
    bf16 = falling(600, 0)
    flat = noise - noise[:, 300:].mean(1, keepdims=True)
    curves = Curves(fp8=bf16 * (1 + BAR + flat[0]), bf16=bf16, bf16_again=bf16 * (1 + 0.1 * flat[1]))
    verdict = judge([curves], bar=BAR, smoothing=SMOOTHING)
    assert verdict.answer == "inconclusive"
    assert "no affordable length" in verdict.reason


def test_short_runs_are_inconclusive_and_say_what_is_needed():
    needed = least_steps(SMOOTHING, seeds=1)
    assert needed == 320
    short, enough = (pairs(1, steps, difference=0.0, correlation=0.0, spread=1e-6) for steps in (needed - 1, needed))
    verdict = judge(short, bar=BAR, smoothing=SMOOTHING)
    assert (verdict.answer, verdict.error) == ("inconclusive", None)
    assert f"verify.steps={needed}" in verdict.reason
    assert answers(enough) == ["yes"]
    assert least_steps(SMOOTHING, seeds=4) == least_steps(SMOOTHING, seeds=100) == 80


def test_the_first_half_does_not_count():
    assert np.array_equal(counted(np.arange(9)), np.arange(4, 9))
    (curves,) = pairs(1, 600, difference=0.0, correlation=0.5, spread=0.1 * BAR)
    early = replace(curves, fp8=curves.fp8 * np.where(np.arange(600) < 100, 1.2, 1.0))
    assert judge([early], bar=BAR, smoothing=SMOOTHING).answer == "yes"


def test_losses_that_are_not_finite():
    (curves,) = pairs(1, 600, difference=0.0, correlation=0.5, spread=0.1 * BAR)
    spoilt = curves.fp8.copy()
    spoilt[300] = math.nan
    verdict = judge([replace(curves, fp8=spoilt)], bar=BAR, smoothing=SMOOTHING)
    assert verdict.answer == "no"
    assert "1 step" in verdict.reason
    # A run that broke off is shorter.
    assert judge([replace(curves, fp8=spoilt[:301])], bar=BAR, smoothing=SMOOTHING).answer == "no"
    with pytest.raises(ValueError, match="BF16 run is not finite"):
        judge([replace(curves, bf16_again=spoilt)], bar=BAR, smoothing=SMOOTHING)


def test_bf16_runs_that_rounded_alike_leave_the_floor_unknown():
    (curves,) = pairs(1, 600, difference=0.0, correlation=0.5, spread=0.1 * BAR)
    verdict = judge([replace(curves, bf16_again=curves.bf16)], bar=BAR, smoothing=SMOOTHING)
    assert verdict.answer == "inconclusive"
    assert "floor unknown" in verdict.reason


def test_interval_ends():
    assert Interval(-0.3, 0.1).reach == pytest.approx(0.4)
    assert Interval(-0.3, 0.1).gap == pytest.approx(0.2)
    assert interval([np.zeros(300)], SMOOTHING) == Interval(0.0, 0.0)


def test_no_torch():
    code = "import sys, octofold.train.precision.verdict; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
