"""The loss scaler: when the scale changes and when it does not, whatever comes, and over a restart."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError
from octofold.train.config import RunConfig, validate
from octofold.train.precision.config import LossScaleConfig
from octofold.train.precision.loss_scale import LossScaler

DYNAMIC = LossScaleConfig("dynamic", init=1024.0, growth_interval=3, least=1.0, most=4096.0)
CONFIGS = st.builds(
    LossScaleConfig,
    kind=st.just("dynamic"),
    init=st.sampled_from([2.0**power for power in range(-3, 8)]),
    growth_interval=st.integers(1, 4),
    backoff=st.sampled_from([0.5, 0.25]),
    hysteresis=st.integers(1, 4),
    least=st.sampled_from([0.125, 0.0625]),
    most=st.sampled_from([128.0, 512.0]),
)
OUTCOMES = st.lists(st.booleans(), max_size=40)


def scales(config: LossScaleConfig, outcomes: str) -> list[float]:
    """The scale after each update: "+" was applied, "-" was skipped."""
    scaler, found = LossScaler(config), []
    for outcome in outcomes:
        scaler.update(applied=outcome == "+")
        found.append(scaler.scale)
    return found


def advance(scaler: LossScaler, outcomes: list[bool]) -> list[float]:
    found = []
    for applied in outcomes:
        scaler.update(applied=applied)
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(("kind", "scale"), [("none", 1.0), ("static", 1024.0)])
def test_only_dynamic_scaling_moves(kind, scale):
    scaler = LossScaler(replace(DYNAMIC, kind=kind))
    assert scaler.scale == scaler.floor == scale
    assert set(advance(scaler, [True] * 9 + [False] * 9)) == {scale}
    assert scaler.overflows == 9


def test_grows_after_updates_in_a_row_up_to_the_most():
    assert scales(DYNAMIC, "++++++") == [1024, 1024, 2048, 2048, 2048, 4096]
    assert scales(DYNAMIC, "+++++++++++++")[-1] == 4096, "the most"
    assert scales(DYNAMIC, "++-+++") == [1024, 1024, 512, 512, 512, 1024], "an overflow begins the count anew"
    assert scales(replace(DYNAMIC, growth=1.5), "+++") == [1024, 1024, 1536]


def test_shrinks_at_each_overflow_down_to_the_least():
    assert scales(DYNAMIC, "---") == [512, 256, 128]
    assert scales(DYNAMIC, "-" * 12)[-2:] == [1, 1]
    assert LossScaler(DYNAMIC).floor == 1


def test_hysteresis_bears_overflows_since_the_scale_last_changed():
    patient = replace(DYNAMIC, hysteresis=2)
    assert scales(patient, "----") == [1024, 512, 512, 256]
    assert scales(patient, "-+-") == [1024, 1024, 512], "an applied update does not make up for an overflow"
    assert scales(patient, "-+++-") == [1024, 1024, 1024, 2048, 2048], "growth does"


@given(config=CONFIGS, outcomes=OUTCOMES)
def test_whatever_comes_the_scale_is_a_power_of_two_within_its_bounds(config, outcomes):
    scaler = LossScaler(config)
    for scale in advance(scaler, outcomes):
        assert config.least <= scale <= config.most
        assert scale.hex().startswith("0x1.0000000000000p")
    assert scaler.overflows == outcomes.count(False)


@given(config=CONFIGS, outcomes=OUTCOMES)
def test_an_overflow_that_goes_on_ends_at_the_floor(config, outcomes):
    scaler = LossScaler(config)
    advance(scaler, outcomes)
    # From the most, halving 13 times passes every least here.
    assert advance(scaler, [False] * (13 * config.hysteresis))[-1] == scaler.floor == config.least


@given(config=CONFIGS, before=OUTCOMES, after=OUTCOMES)
def test_a_restart_changes_nothing(config, before, after):
    scaler, resumed = LossScaler(config), LossScaler(config)
    advance(scaler, before)
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert (resumed.scale, resumed.overflows) == (scaler.scale, scaler.overflows)
    assert advance(resumed, after) == advance(scaler, after)
    assert resumed.state_dict() == scaler.state_dict()


@pytest.mark.parametrize(
    ("now", "scale"),
    [
        (replace(DYNAMIC, growth_interval=9, hysteresis=1), 256.0),
        (replace(DYNAMIC, init=64.0, most=128.0), 128.0),
        (replace(DYNAMIC, least=512.0), 512.0),
        (replace(DYNAMIC, kind="static"), 1024.0),
        (LossScaleConfig(), 1.0),
    ],
)
def test_the_configuration_of_the_restart_holds(now, scale):
    scaler, resumed = LossScaler(replace(DYNAMIC, hysteresis=2)), LossScaler(now)
    advance(scaler, [False] * 4)
    resumed.load_state_dict(scaler.state_dict())
    assert (resumed.scale, resumed.overflows) == (scale, 4)
    assert now.least <= advance(resumed, [False])[0] <= scale


def test_dynamic_scaling_begins_at_its_first_scale_after_a_run_without():
    scaler = LossScaler(DYNAMIC)
    scaler.load_state_dict(LossScaler(LossScaleConfig()).state_dict())
    assert scaler.scale == 1024


def test_a_scale_that_fp32_cannot_undo_is_refused():
    precision = replace(RunConfig().precision, loss_scale=replace(DYNAMIC, most=2.0**127))
    with pytest.raises(ConfigError, match=r"^precision\.loss_scale\.most="):
        validate(replace(RunConfig(), precision=precision), 1)
