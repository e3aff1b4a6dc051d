"""Learning rates: bounds, end points, no jumps, warm-up of any length."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.train.config import SCHEDULES, OptimConfig
from octofold.train.optim.schedule import learning_rate

LR = 0.5
BASE = OptimConfig(lr=LR, warmup_steps=0, min_lr_ratio=0.1, decay_share=0.2)


def rates(optim: OptimConfig, total: int, beyond: int = 0) -> list[float]:
    return [learning_rate(optim, update, total) for update in range(total + beyond)]


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warmup=st.integers(0, 320),
    ratio=st.floats(0, 1),
    decay_share=st.floats(0, 1),
)
def test_bounds_and_continuity(schedule, total, warmup, ratio, decay_share):
    optim = replace(BASE, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio, decay_share=decay_share)
    curve = rates(optim, total, beyond=5)
    floor, tiny = LR * ratio, 1e-12
    assert all(0 <= rate <= LR + tiny for rate in curve)
    assert all(rate >= floor - tiny for rate in curve[warmup:])
    rising, after = curve[:warmup], curve[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert after == sorted(after, reverse=True)
    assert all(abs(b - a) <= LR / warmup + tiny for a, b in pairwise(rising))
    # The steepest fall in one update: a straight line for wsd, the middle of half a cosine wave.
    fall = {
        "constant": 0.0,
        "wsd": 1 / max(1.0, min(decay_share * total, total - warmup)),
        "cosine": 1.6 / max(1, total - warmup),
    }
    assert all(a - b <= fall[schedule] * (LR - floor) + tiny for a, b in pairwise(after))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up(schedule):
    optim = replace(BASE, schedule=schedule, warmup_steps=4)
    assert rates(optim, 100)[:5] == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR, LR])
    assert learning_rate(replace(optim, warmup_steps=0), 0, 100) == LR


def test_cosine_end_points():
    optim = replace(BASE, schedule="cosine", warmup_steps=20)
    assert learning_rate(optim, 60, 100) == pytest.approx((LR + 0.1 * LR) / 2), "half of the way"
    assert learning_rate(optim, 100, 100) == pytest.approx(0.1 * LR)
    assert learning_rate(optim, 1000, 100) == pytest.approx(0.1 * LR), "it does not rise again"


def test_wsd_is_stable_and_then_falls_linearly():
    curve = rates(replace(BASE, schedule="wsd", warmup_steps=10), 100, beyond=50)
    assert set(curve[10:81]) == {LR}
    assert curve[90] == pytest.approx((LR + 0.1 * LR) / 2)
    assert curve[100:] == pytest.approx([0.1 * LR] * 50)


def test_wsd_whose_warm_up_reaches_into_the_decay_falls_from_the_full_rate():
    curve = rates(replace(BASE, schedule="wsd", warmup_steps=50, decay_share=0.9), 100, beyond=1)
    assert curve[49] == curve[50] == LR
    assert curve[75] == pytest.approx((LR + 0.1 * LR) / 2)
    assert curve[100] == pytest.approx(0.1 * LR)


def test_constant_stays():
    assert set(rates(replace(BASE, schedule="constant"), 30, beyond=30)) == {LR}
