"""An anomaly as it is told: a sentence for people, a record for the metrics. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from octofold.train.anomaly.blame import Blame, numbered
from octofold.train.anomaly.judge import Finding

MOST_ORIGINS = 8
"""Samples of which a record says where they come from."""
CAUSES = {
    "device": "a device",
    "weights": "the weights",
    "data or model": "the data or the model, since a second pass does the same",
    "data or weights": "the data or the weights, since a second pass does the same",
    "replicas": "a device or its memory",
}


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step, and what is known of the origin."""

    finding: Finding
    blame: Blame
    cause: str
    """One of `CAUSES`."""

    def __str__(self) -> str:
        blame, of_device = self.blame, self.cause == "device"
        ranks = _ranks(blame.ranks)
        if self.finding.what == "replicas":
            return f"copies of {blame.layer} that must be equal differ: the odd one out is that of {ranks}"
        if self.finding.what == "recheck":
            where = f", first in {blame.layer} ({blame.direction})" if blame.layer else ""
            return f"two passes over the same batch from the same weights differ on {ranks}{where}: a device erred"
        if of_device:
            whose = f" (of {ranks})" if blame.ranks else "; train.recheck_every=1 names it when it errs again"
            return f"{self.finding}; a second pass over the same batch is sound: a device erred{whose}"
        places = []
        if blame.layer:
            how = "not finite itself" if self.cause == "weights" else blame.direction
            places.append(f"{blame.layer} ({how})" if how else blame.layer)
        if blame.ranks:
            places.append(f"on {ranks}")
        if blame.samples:
            places.append(numbered(blame.samples))
        first = "most in" if self.finding.what == "spike" else "first in"
        return f"{self.finding}: {first} {', '.join(places)}" if places else f"{self.finding}, of unknown origin"

    def record(self, step: int, origin: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The `anomaly` record of the metrics.

        Args:
            origin: where a global sample comes from.
        """
        finding, blame = self.finding, self.blame
        return {
            "kind": "anomaly",
            "step": step,
            "what": finding.what,
            **({"number": finding.number, "value": finding.value} if finding.number else {}),
            **({"usual": finding.usual} if finding.usual is not None else {}),
            "cause": self.cause,
            "ranks": blame.ranks,
            "layer": blame.layer,
            "direction": blame.direction,
            "samples": blame.samples,
            "origins": [origin(sample) for sample in blame.samples[:MOST_ORIGINS]],
            "account": str(self),
        }


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "no rank that could be told"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
