"""Holds a continued run to the undisturbed one: every number, tensor and sample, the worst offender first. Torch-free.

Two runs on one layout agree bit for bit. On another layout the tensors that were loaded still do, and what is computed
from them agrees within rounding (train/layout/verdict.py).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf, nan
from typing import Any

import numpy as np

from octofold.train.layout.verdict import BALANCE_LOSSES, Difference, Key, Told, ratio
from octofold.train.resume.facts import Course, Standing

SMALLEST = float(np.finfo(np.float64).smallest_subnormal)
"""Counts as the error of numbers that are equal and not the same bits, such as 0 and -0."""
KINDS = {"loss": "loss", "grad_norm": "gradient norm", "tokens": "tokens", "lr": "learning rate"}
SAME_LAYOUT_KINDS = {
    "loss_scale": "loss scale",
    "overflows": "overflows",
    "applied": "applied",
    "rank_imbalance": "placement",
    "moved_experts": "placement",
}
"""Numbers of a report that depend on the layout, or may: rounding decides an overflow."""


def told_of_steps(courses: Sequence[Course], steps: Sequence[int], *, same_layout: bool) -> Told:
    """What every rank reported of these steps, and what the ranks together read in them."""
    by_key: Told = defaultdict(dict)
    for course in courses:
        for step in steps:
            for key, value in _of_report(step, course.reports.get(step, {}), same_layout):
                by_key[key][course.rank] = np.asarray(value, dtype=np.float64)
    for step in steps:
        by_key[Key("samples", step)][0] = np.array(samples_of(courses, step), dtype=np.float64)
    return dict(by_key)


def told_of_standing(courses: Sequence[Course], step: int, *, placement: bool) -> Told:
    """What a checkpoint after `step` steps would hold: tensors, and the numbers of its state.

    Args:
        placement: also where experts stand, which another layout decides for itself.
    """
    by_key: Told = defaultdict(dict)
    for course in courses:
        held: Standing | None = course.standings.get(step)
        if held is None:
            continue
        for name, tensor in held.tensors.items():
            by_key[Key(kind_of(name), step, name)][course.rank] = tensor
        for name, value in leaves(held.state):
            if placement or not name.startswith("placement"):
                by_key[Key("state", step, name)][course.rank] = np.asarray(value)
    return dict(by_key)


def samples_of(courses: Sequence[Course], step: int) -> list[int]:
    """Digests of the sequences of a step in the global order, micro-batch by micro-batch over data ranks.

    Ranks that are to read the same and do not are all listed, so that they differ from any run where they do.
    """
    read: dict[int, list[list[list[int]]]] = defaultdict(list)
    for course in courses:
        if (own := course.samples.get(step)) is not None and own not in read[course.data_rank]:
            read[course.data_rank].append(own)
    everyone = [of_rank for _, versions in sorted(read.items()) for of_rank in versions]
    return list(chain.from_iterable(chain.from_iterable(zip(*everyone, strict=False))))


def kind_of(name: str) -> str:
    """Of a tensor by its name in a checkpoint: weight, bias, moment or FP8 state."""
    if name.startswith("optim."):
        return "moment"
    if name.startswith("precision."):
        return "FP8 state"
    return "bias" if name.endswith("e_score_correction_bias") else "weight"


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside nested dicts and lists of a state, by dotted name."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}{'.' if prefix else ''}{name}")
    elif isinstance(tree, list) and tree and all(isinstance(item, int | float) for item in tree):
        yield prefix, np.array(tree)
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix}[{number}]")
    else:
        yield prefix, str(tree) if tree is None else tree


def compare_bits(found: Told, expected: Told) -> list[Difference]:
    """Every number and tensor of either that is not the same on every rank that tells it, the worst first."""
    differences = []
    for key in found.keys() | expected.keys():
        ours, theirs = found.get(key, {}), expected.get(key, {})
        if not ours or not theirs:
            note = "missing" if not ours else "the undisturbed run knows nothing of it"
            differences.append(Difference(key, inf, nan, min(ours or theirs), note))
            continue
        # On another layout other ranks speak for a tensor; whoever does, says the same.
        reference = theirs[min(theirs)]
        apart = [_bits(key, rank, value, theirs.get(rank, reference)) for rank, value in ours.items()]
        worst = max((d for d in apart if d is not None), key=lambda d: (d.error, -d.rank), default=None)
        if worst is not None:
            differences.append(worst)
    return sorted(differences, key=lambda d: (-d.error, d.key.step, d.key))


def _bits(key: Key, rank: int, value: np.ndarray, reference: np.ndarray) -> Difference | None:
    if value.shape != reference.shape:
        note = f"shape {list(value.shape)}, was {list(reference.shape)}"
        return Difference(key, inf, nan, rank, note)
    if value.dtype.kind not in "fiub" or reference.dtype.kind not in "fiub":
        same = value.dtype.kind == reference.dtype.kind and bool((value == reference).all())
        return None if same else Difference(key, inf, nan, rank, f"{value}, was {reference}")
    if np.array_equal(value, reference, equal_nan=value.dtype.kind == "f") and (
        value.dtype.kind != "f" or np.array_equal(np.signbit(value), np.signbit(reference))
    ):
        return None
    if value.size == 1:
        note = f"{value.item():.17g}, was {reference.item():.17g}"
    elif not value.any() and reference.any():
        note = "zero"
    else:
        note = f"{np.count_nonzero(value != reference)} of {value.size} numbers"
    return Difference(key, _relative(value, reference), ratio(value, reference), rank, note)


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    wide, right = value.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(wide).all() and np.isfinite(right).all()):
        return inf
    apart, scale = float(np.abs(wide - right).max()), float(np.abs(right).max())
    return max(apart / scale if scale else inf, SMALLEST) if apart else SMALLEST


def _of_report(step: int, report: dict[str, Any], same_layout: bool) -> Iterator[tuple[Key, Any]]:
    for name, kind in (KINDS | SAME_LAYOUT_KINDS if same_layout else KINDS).items():
        if name in report:
            yield Key(kind, step, name if kind == "placement" else ""), report[name]
    for depth, loss in enumerate(report.get("mtp_losses", ()), start=1):
        yield Key("MTP loss", step, f"depth {depth}"), loss
    for name in BALANCE_LOSSES:
        if name in report:
            yield Key("balance loss", step, name), report[name]
    for layer, shares in report.get("expert_load", {}).items():
        yield Key("load", step, f"layer {layer}"), shares
