"""Whether the numbers of a step are sound, and how many that are not a run survives. Torch-free.

Everything here follows from sums over all ranks, so that each of them decides alike without asking. A spike stands out
of the steps before it: above their median by `train.spike_factor` times their spread (the median distance from the
median, scaled to a standard deviation). The norm's logarithm is taken, since norms of one run differ by factors. Steps
that were not applied do not count, so a level that rises for good is a spike until the bound ends the run.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from octofold.backends.errors import UserError

SEEN = 64
"""Applied steps that a spike is judged by."""
LEAST_SEEN = 32
"""Before so many there is no spike: norms and losses fall steeply at the start of a run."""
LEAST_SPREAD = {"loss": 0.02, "gradient norm": 0.1}
"""Below these a spread is not taken for one: of the loss, a share of its median; of the logarithm of the norm."""
DEVIATION = 1.4826
"""A standard deviation ÷ the median distance from the median, of normal numbers."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step."""

    what: str
    """not_finite, spike, or what other checks of this folder find: device, replicas."""
    number: str = ""
    """loss or gradient norm."""
    value: float = math.nan
    usual: float | None = None
    """The median that a spike stands out of."""

    def __str__(self) -> str:
        if self.what == "spike":
            return f"{self.number} is {self.value:.4g}, usually {self.usual:.4g}"
        return f"{self.number} is {self.value:g}"


class Judge:
    """Remembers the numbers of applied steps."""

    def __init__(self, spike_factor: float) -> None:
        """`spike_factor`: see above; 0: only what is not finite is wrong."""
        self.spike_factor = spike_factor
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=SEEN) for name in LEAST_SPREAD}

    def find(self, losses: Mapping[str, Any], grad_norm: float, *, curable: bool) -> Finding | None:
        """What is wrong; None: nothing, or nothing but an overflow that a smaller loss scale may cure.

        Args:
            losses: all of the step's by name, numbers or lists of them; `loss` is the one that may spike.
            curable: the loss scale can still shrink.
        """
        numbers = [*_flat(losses.values())]
        if not math.isfinite(grad_norm):
            # A loss is computed without the scale: if it is finite, the scale may be to blame.
            return None if curable and all(map(math.isfinite, numbers)) else _not_finite("gradient norm", grad_norm)
        for number in numbers:
            if not math.isfinite(number):
                return _not_finite("loss", number)
        if not self.spike_factor:
            return None
        loss, norm = float(losses["loss"]), grad_norm
        return self._spike("loss", loss, loss) or self._spike("gradient norm", norm, _log(norm))

    def accept(self, loss: float, grad_norm: float) -> None:
        """Count the numbers of an applied step."""
        if self.spike_factor:
            self._seen["loss"].append(loss)
            self._seen["gradient norm"].append(grad_norm)

    def _spike(self, number: str, value: float, x: float) -> Finding | None:
        seen = self._seen[number]
        if len(seen) < LEAST_SEEN:
            return None
        of_norm = number == "gradient norm"
        past = [_log(y) if of_norm else y for y in seen]
        middle = median(past)
        least = LEAST_SPREAD[number] * (1.0 if of_norm else abs(middle))
        spread = max(DEVIATION * median(abs(y - middle) for y in past), least)
        if x <= middle + self.spike_factor * spread:
            return None
        return Finding("spike", number, value, median(seen))

    def state_dict(self) -> dict[str, list[float]]:
        """For a checkpoint: a resumed run judges as the uninterrupted one."""
        return {name: list(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Iterable[float]]) -> None:
        """Continue from `state_dict`."""
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(state.get(name, []))


class Bound:
    """At most `most` anomalies within `window` steps.

    Steps are numbers of updates, and stay counted when a run goes back: a run that comes to the same anomaly again and
    again stops, however far back it goes each time.
    """

    def __init__(self, most: int, window: int) -> None:
        self.most, self.window = most, window
        self.recent: list[tuple[int, str]] = []
        """(step, account), in the order in which they came."""

    def note(self, step: int, account: str) -> None:
        """Count an anomaly."""
        self.recent = [(at, said) for at, said in self.recent if at > step - self.window]
        self.recent.append((step, account))

    @property
    def exceeded(self) -> bool:
        """Whether the run is to stop."""
        return len(self.recent) > self.most


def stop_error(bound: Bound, policy: str, last_checkpoint: object, scaled: bool) -> UserError:
    """Why a run ends at its last anomaly, and what it was told of the last few before."""
    step, account = bound.recent[-1]
    if policy == "stop" and not bound.exceeded:
        rule = "train.on_anomaly=stop: nothing is trained beyond an anomaly"
        return UserError(
            f"step {step}: {account}\n"
            f"  rule:   {rule}\n"
            f"  remedy: mend what is named and resume (last checkpoint: {last_checkpoint}), or train.on_anomaly=skip"
        )
    shown = "".join(f"\n    step {at}: {said}" for at, said in bound.recent[-5:])
    lower = "optim.lr or precision.loss_scale.init" if scaled else "optim.lr"
    return UserError(
        f"step {step}: {len(bound.recent)} anomalies within {bound.window} steps; the last of them:{shown}\n"
        f"  rule:   at most train.max_anomalies={bound.most} of them in train.anomaly_window={bound.window} steps; "
        "a run that meets more has broken weights, data or devices\n"
        f"  remedy: mend what is named, or resume from an earlier checkpoint (last: {last_checkpoint}) "
        f"with a lower {lower}"
    )


def _not_finite(number: str, value: float) -> Finding:
    return Finding("not_finite", number, value)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))


def _flat(values: Iterable[Any]) -> Iterable[float]:
    for value in values:
        yield from value if isinstance(value, list) else [value]
