"""Which numbers of a step are sound: no alarm without cause, none missed, the same after a restart."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError
from octofold.train.anomaly.judge import LEAST_SEEN, Bound, Judge, stop_error
from octofold.train.config import RunConfig, TrainConfig, validate

NAN, INF = math.nan, math.inf


def healthy(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses and gradient norms as runs have them: a steep fall, then a slow one; norms that vary by factors."""
    chance = random.Random(seed)
    losses = [6.0 * (step + 1) ** -0.2 * chance.lognormvariate(0, 0.02) for step in range(steps)]
    norms = [(3.0 if step < 50 else 0.8) * chance.lognormvariate(0, 0.4) for step in range(steps)]
    return list(zip(losses, norms, strict=True))


def judged(judge: Judge, loss: float, norm: float, **losses: object) -> str | None:
    """What the judge says of a step, which it accepts if it says nothing."""
    finding = judge.find({"loss": loss, **losses}, norm, curable=False)
    if finding is None:
        judge.accept(loss, norm)
    return None if finding is None else str(finding)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [6.0, 10.0])
def test_a_healthy_run_raises_no_alarm(factor, seed):
    judge = Judge(factor)
    assert [said for step in healthy(2000, seed) if (said := judged(judge, *step))] == []


@given(seed=st.integers(0, 10**6), after=st.integers(150, 400))
def test_a_spike_is_seen_wherever_it_comes(seed, after):
    """Once the steep part is over, which is as uneven as a spike."""
    judge = Judge(10.0)
    steps = healthy(after, seed)
    for step in steps:
        judged(judge, *step)
    loss, norm = steps[-1]
    assert (judged(judge, loss * 3, norm) or "").startswith("loss is ")
    assert (judged(judge, loss, norm * 1000) or "").startswith("gradient norm is ")
    assert judged(judge, loss, norm) is None, "a spike is not remembered as usual"


def test_a_spike_needs_steps_to_stand_out_of_and_a_factor():
    young, off = Judge(10.0), Judge(0.0)
    for _ in range(LEAST_SEEN - 1):
        assert judged(young, 2.0, 1.0) is None
    assert judged(young, 1e6, 1e6) is None
    for _ in range(100):
        judged(off, 2.0, 1.0)
    assert judged(off, 1e6, 1e6) is None


def test_numbers_that_are_all_alike_have_room():
    """Without a least spread, the second decimal of a flat curve would be a spike."""
    judge = Judge(10.0)
    for _ in range(100):
        judged(judge, 2.0, 1.0)
    assert judged(judge, 2.3, 2.0) is None
    assert judged(judge, 2.5, 1.0) == "loss is 2.5, usually 2"
    assert judged(judge, 2.0, 3.0) == "gradient norm is 3, usually 1"


@pytest.mark.parametrize(
    ("losses", "norm", "curable", "said"),
    [
        ({"loss": 2.0}, NAN, False, "gradient norm is nan"),
        ({"loss": 2.0}, INF, True, None),
        ({"loss": NAN}, INF, True, "gradient norm is inf"),
        ({"loss": 2.0, "mtp_losses": [1.0, NAN]}, INF, True, "gradient norm is inf"),
        ({"loss": 2.0, "mtp_losses": [1.0, INF]}, 1.0, True, "loss is inf"),
        ({"loss": 2.0, "z_loss": NAN}, 1.0, False, "loss is nan"),
        ({"loss": 2.0}, 1.0, False, None),
    ],
)
def test_what_is_not_finite(losses, norm, curable, said):
    """An overflow that a smaller scale may cure leaves the loss finite, which is computed without it."""
    finding = Judge(0.0).find(losses, norm, curable=curable)
    assert said == (None if finding is None else str(finding))


def test_a_restarted_judge_goes_on_alike():
    whole, steps = Judge(6.0), healthy(100)
    for step in steps[:50]:
        judged(whole, *step)
    resumed = Judge(6.0)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for loss, norm in [*steps[50:], (50.0, 1.0)]:
        assert judged(whole, loss, norm) == judged(resumed, loss, norm)


def test_the_bound_counts_steps_and_not_attempts():
    bound = Bound(most=2, window=10)
    for step, exceeded in [(1, False), (5, False), (11, False), (14, True), (14, True)]:
        bound.note(step, f"at {step}")
        assert bound.exceeded == exceeded, step
    bound = Bound(most=2, window=10)
    for _ in range(3):  # gone back to step 8 each time, to come to the same end
        bound.note(12, "again")
    assert bound.exceeded
    assert str(stop_error(bound, "rollback", "c/step_8", scaled=False)).count("again") == 3


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"on_anomaly": "rolback"}, "train.on_anomaly"),
        ({"spike_factor": 1.0}, "train.spike_factor"),
        ({"spike_factor": INF}, "train.spike_factor"),
        ({"max_anomalies": -1}, "train.max_anomalies"),
        ({"anomaly_window": 0}, "train.anomaly_window"),
        ({"recheck_every": -1}, "train.recheck_every"),
        ({"check_replicas_every": -5}, "train.check_replicas_every"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, key):
    with pytest.raises(ConfigError, match=key):
        validate(RunConfig(train=TrainConfig(**values)), 1)
