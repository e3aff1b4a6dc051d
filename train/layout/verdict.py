"""Holds what the ranks of a layout saw to what one rank saw: every number, the worst offender first. Torch-free.

The error of a tensor is max |a - b| / max |b|, b being the one rank's; of a number |a - b| / |b|. A tensor counts as
large enough for rounding not to matter: a gradient that is zero by theory is a few roundings of the largest gradient
(eps · largest), which would be any share of itself. So max |b| is at least eps / tolerance · the largest of its kind in
that step, and a tensor that is lost altogether is still seen unless the rounding of others would drown it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np

from octofold.train.layout.facts import RankFacts, StepFacts

BALANCE_LOSSES = ("sequence_loss", "expert_loss", "device_loss", "communication_loss", "z_loss")


@dataclass(frozen=True, order=True)
class Key:
    """What a number is called."""

    kind: str
    """loss, MTP loss, balance loss, tokens, gradient norm, load, bias, gradient or weight."""
    step: int
    """1 is the first."""
    name: str = ""
    """Of the parameter, layer, depth or loss."""

    def __str__(self) -> str:
        return f"{self.kind}{' of ' if self.name else ''}{self.name}, step {self.step}"


@dataclass(frozen=True)
class Difference:
    """How far a layout is from one rank in one number or tensor."""

    key: Key
    error: float
    """Relative; infinite where something is missing or not finite."""
    ratio: float
    """Least squares: the layout's is about so many times the one rank's; nan where that is zero."""
    rank: int
    """The rank that is furthest off; -1: none has it."""
    note: str = ""


Told = dict[Key, dict[int, np.ndarray]]
"""By name, then by the rank that told it."""


def told(facts: Sequence[RankFacts]) -> Told:
    """Everything that the ranks saw, by name."""
    by_key: Told = defaultdict(dict)
    for of_rank in facts:
        for number, step in enumerate(of_rank.steps, start=1):
            for key, value in _of_step(number, step):
                by_key[key][of_rank.rank] = np.asarray(value)
        for name, weight in of_rank.weights.items():
            by_key[Key("weight", len(of_rank.steps), name)][of_rank.rank] = weight
    return dict(by_key)


def _of_step(number: int, step: StepFacts) -> Iterator[tuple[Key, Any]]:
    report = step.report
    yield Key("loss", number), report["loss"]
    yield Key("gradient norm", number), report["grad_norm"]
    yield Key("tokens", number), float(report["tokens"])
    for depth, loss in enumerate(report.get("mtp_losses", ()), start=1):
        yield Key("MTP loss", number, f"depth {depth}"), loss
    for name in BALANCE_LOSSES:
        if name in report:
            yield Key("balance loss", number, name), report[name]
    for layer, shares in report.get("expert_load", {}).items():
        yield Key("load", number, f"layer {layer}"), shares
    for layer, bias in step.biases.items():
        yield Key("bias", number, f"layer {layer}"), bias
    for name, gradient in step.gradients.items():
        yield Key("gradient", number, name), gradient


def compare(found: Told, expected: Told, tolerance: float) -> list[Difference]:
    """Every number and tensor of either, the worst first; among equals the earliest step, then by name."""
    largest: dict[tuple[str, int], float] = defaultdict(float)
    for key, values in expected.items():
        (value,) = values.values()
        largest[key.kind, key.step] = max(largest[key.kind, key.step], float(np.abs(value).max(initial=0.0)))
    differences = []
    for key in found.keys() | expected.keys():
        if key not in expected:
            rank = min(found[key])
            differences.append(Difference(key, inf, float("nan"), rank, "one rank knows nothing of it"))
            continue
        (reference,) = expected[key].values()
        least = np.finfo(reference.dtype if reference.dtype.kind == "f" else np.float64).eps / tolerance
        differences.append(_difference(key, found.get(key, {}), reference, least * largest[key.kind, key.step]))
    return sorted(differences, key=lambda d: (-d.error, d.key.step, d.key))


def _difference(key: Key, values: dict[int, np.ndarray], reference: np.ndarray, least: float) -> Difference:
    """The rank that is furthest off; `least`: what the reference's magnitude counts as at least."""
    if not values:
        return Difference(key, inf, 0.0, -1, "missing on every rank")
    errors = {rank: _error(value, reference, least) for rank, value in values.items()}
    rank = max(errors, key=lambda rank: (errors[rank], -rank))
    value, note = values[rank], ""
    if value.shape != reference.shape:
        note = f"shape {list(value.shape)}, of one rank {list(reference.shape)}"
    elif not np.isfinite(value).all():
        note = "not finite"
    elif not value.any() and reference.any():
        note = "zero"
    return Difference(key, errors[rank], ratio(value, reference), rank, note)


def _error(value: np.ndarray, reference: np.ndarray, least: float) -> float:
    if value.shape != reference.shape or not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return inf
    apart = float(np.abs(value - reference).max(initial=0.0))
    scale = max(float(np.abs(reference).max(initial=0.0)), least)
    return apart / scale if scale else (inf if apart else 0.0)


def ratio(value: np.ndarray, reference: np.ndarray) -> float:
    """The r that brings r · reference closest to the value; nan where there is none."""
    square = float(np.vdot(reference, reference))
    if value.shape != reference.shape or not square or not isfinite(square):
        return float("nan")
    return float(np.vdot(reference, value)) / square
