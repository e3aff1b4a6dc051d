"""Loss scaling: a factor on the loss that keeps small gradients above the least number of a narrow format.

Pure Python: the decision that a gradient overflowed is made elsewhere, once for the whole world, and every rank passes
the same answer. Nothing tells an overflow from a batch that is not finite at any scale, so each skipped update counts
as an overflow; a scale that shrank for such a batch grows back.
"""

from typing import Any

from octofold.train.precision.config import LossScaleConfig


class LossScaler:
    """The scale of the next update, and what decides when it changes (`precision.loss_scale`)."""

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.scale = 1.0 if config.kind == "none" else config.init
        """What the loss of the next update is multiplied by. A power of two is exact: only numbers that would leave the
        format's range come out otherwise than without it."""
        self.overflows = 0
        """Updates skipped so far."""
        self._applied_in_row = 0
        self._tolerance_left = config.hysteresis

    @property
    def floor(self) -> float:
        """The smallest scale that skipped updates can lead to."""
        return self.config.least if self.config.kind == "dynamic" else self.scale

    def update(self, *, applied: bool) -> None:
        """Take note of an update that was applied, or skipped since a gradient was not finite."""
        self.overflows += not applied
        if self.config.kind != "dynamic":
            return
        if applied:
            self._applied_in_row += 1
            if self._applied_in_row == self.config.growth_interval:
                self._change(self.config.growth)
            return
        self._applied_in_row = 0
        self._tolerance_left -= 1
        if self._tolerance_left <= 0:
            self._change(self.config.backoff)

    def _change(self, factor: float) -> None:
        self.scale = min(max(self.scale * factor, self.config.least), self.config.most)
        self._applied_in_row, self._tolerance_left = 0, self.config.hysteresis

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {
            "kind": self.config.kind,
            "scale": self.scale,
            "overflows": self.overflows,
            "applied_in_row": self._applied_in_row,
            "tolerance_left": self._tolerance_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. A scale is taken over from dynamic to dynamic scaling, within the bounds that are
        configured now; else the configured one holds."""
        self.overflows = state["overflows"]
        if self.config.kind == state["kind"] == "dynamic":
            self.scale = min(max(state["scale"], self.config.least), self.config.most)
            self._applied_in_row = min(state["applied_in_row"], self.config.growth_interval - 1)
            self._tolerance_left = min(state["tolerance_left"], self.config.hysteresis)
