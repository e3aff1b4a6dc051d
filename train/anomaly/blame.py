"""Who and what made a step go wrong, from what every rank saw of it. Torch-free.

Each rank tells the first place where its numbers go wrong; what is wrong elsewhere came from there, over collectives.
The ranks of a pipeline stage run the same modules in the same order, and stages follow one another: so the place in
that order says who was first.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Self

from octofold.train.anomaly.events import BACKWARD, FORWARD, Event, Traced

MOST_SAMPLES = 64
"""That a rank names; of a bad weight every sample is one."""


@dataclass(frozen=True)
class Place:
    """Where numbers go wrong on a rank."""

    module: str
    direction: str
    operation: str
    micro: int
    stage: int
    order: int
    """Among all that the stage does in a pass of the micro-batch."""
    was_given: bool = False
    """Wrong numbers came in here before any came out of anything: from another rank, or from what is not watched."""

    @property
    def when(self) -> tuple[int, int, int, bool]:
        """Orders places of one direction by who can have passed wrong numbers on to whom."""
        stage = self.stage if self.direction == FORWARD else -self.stage
        return self.micro, stage, self.order, self.was_given


@dataclass(frozen=True)
class Testimony:
    """What one rank says of a step."""

    rank: int
    place: Place | None = None
    samples: dict[str, list[int]] = field(default_factory=dict)
    """Global samples that carry broken numbers, by direction; of a spike by the loss ("loss") or gradient norm."""
    heights: dict[str, list[float]] = field(default_factory=dict)
    """Of a spike: what each of them stands at."""
    broken_weights: list[str] = field(default_factory=list)
    """Parameters of which this rank's shard is not finite."""
    differs: bool = False
    """Another pass over the same batch gave this rank another loss."""

    def encode(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """From `encode`."""
        values = json.loads(text)
        place = values.pop("place")
        return cls(place=None if place is None else Place(**place), **values)


@dataclass(frozen=True)
class Blame:
    """What is known of the origin."""

    ranks: list[int]
    """That the wrong numbers come from; empty: none could be told."""
    layer: str | None
    """The first module that is wrong, or the parameter that is not finite."""
    direction: str | None
    samples: list[int]
    """Global samples that carried them."""


def first_break(events: Sequence[Event], stages: int) -> Place | None:
    """Where numbers first stop being finite on this rank.

    Args:
        stages: of the pipeline.
    """
    return _first_wrong([(e, e.given_is_finite, e.made_is_finite) for e in events], stages)


def first_difference(events: Sequence[Event], others: Sequence[Event], stages: int) -> Place | None:
    """Where the numbers of two runs of one step first differ on this rank."""
    # Up to the end of the shorter one: what went otherwise may have taken another way from there.
    pairs = zip(events, others, strict=False)
    return _first_wrong([(a, a.given_bits == b.given_bits, a.made_bits == b.made_bits) for a, b in pairs], stages)


def _first_wrong(judged: Sequence[tuple[Event, bool, bool]], stages: int) -> Place | None:
    """`judged`: (event, what it was given is right, what it made is right)."""
    passes: dict[tuple[str, int, int], list[tuple[Event, bool, bool]]] = {}
    for event, given, made in judged:
        passes.setdefault((event.direction, event.micro, event.stage), []).append((event, given, made))
    for direction in (FORWARD, BACKWARD):
        places = [_in_pass(of_pass, stages) for key, of_pass in passes.items() if key[0] == direction]
        if found := [place for place in places if place is not None]:
            return min(found, key=lambda place: place.when)
        # What is wrong going forward, though it came from elsewhere, is wrong going back.
        if any(not given or not made for event, given, made in judged if event.direction == direction):
            return None
    return None


def _in_pass(judged: Sequence[tuple[Event, bool, bool]], stages: int) -> Place | None:
    for order, (event, given, made) in enumerate(judged):
        if given and made:
            continue
        if given:
            return Place(event.module, event.direction, event.operation, event.micro, event.stage, order)
        received = event.stage > 0 if event.direction == FORWARD else event.stage < stages - 1
        if not order and received:
            return None  # from the neighbouring stage
        # It went wrong between the modules inside of another one, which was given nothing wrong.
        for around, around_given, around_made in judged[order:]:
            inside = not around.module or event.module.startswith(f"{around.module}.")
            if event.direction == FORWARD and inside and around_given and not around_made:
                event = around
                break
        return Place(event.module, event.direction, event.operation, event.micro, event.stage, order, was_given=True)
    return None


def broken_samples(traced: Traced, samples_AB: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """By direction, the global samples whose numbers are not finite where that first shows in their micro-batch."""
    found: dict[str, list[int]] = {FORWARD: [], BACKWARD: []}
    seen: set[tuple[str, int]] = set()
    for rows in traced.sequences:
        broken = [sample for sample, finite in zip(samples_AB[rows.micro], rows.finite_B, strict=True) if not finite]
        if broken and (rows.direction, rows.micro) not in seen:
            seen.add((rows.direction, rows.micro))
            found[rows.direction] += broken
    return {direction: sorted(samples)[:MOST_SAMPLES] for direction, samples in found.items()}


def heights(traced: Traced, samples_AB: Sequence[Sequence[int]], layer: str | None) -> dict[str, dict[int, float]]:
    """What each sample contributes to the loss, and to the norm of the gradient at a layer's input or output.

    Args:
        layer: name of a module or parameter; the blocks nearest to it count, all where there are none.
    """
    of_loss = {
        sample: loss
        for samples_B, loss_B in zip(samples_AB, traced.loss_AB, strict=False)
        for sample, loss in zip(samples_B, loss_B, strict=True)
    }
    backward = [rows for rows in traced.sequences if rows.direction == BACKWARD]
    near = [rows for rows in backward if layer is not None and layer.startswith(rows.module)] or backward
    of_norm: dict[int, float] = {}
    for rows in near:
        for sample, norm in zip(samples_AB[rows.micro], rows.norm_B, strict=True):
            of_norm[sample] = max(of_norm.get(sample, 0.0), norm)
    return {"loss": of_loss, "gradient norm": of_norm}


def accuse(testimonies: Sequence[Testimony]) -> Blame:
    """The origin of numbers that are not finite."""
    holders = {said.rank: said.broken_weights for said in testimonies if said.broken_weights}
    forward = sorted({sample for said in testimonies for sample in said.samples.get(FORWARD, [])})
    backward = sorted({sample for said in testimonies for sample in said.samples.get(BACKWARD, [])})
    if holders:
        return Blame(sorted(holders), next(iter(holders.values()))[0], None, forward or backward)
    ranks, place = first_place(testimonies)
    if place is None:
        return Blame([], None, None, forward or backward)
    return Blame(ranks, place.module or "model", place.direction, forward if place.direction == FORWARD else backward)


def first_place(testimonies: Iterable[Testimony]) -> tuple[list[int], Place | None]:
    """The earliest of the places that ranks name, and the ranks that name it."""
    named = [(said.rank, said.place) for said in testimonies if said.place is not None]
    going = FORWARD if any(place.direction == FORWARD for _, place in named) else BACKWARD
    named = [(rank, place) for rank, place in named if place.direction == going]
    if not named:
        return [], None
    _, first = min(named, key=lambda pair: pair[1].when)
    alike = (first.module, first.operation, first.stage, first.order, first.was_given)
    same = [rank for rank, p in named if (p.module, p.operation, p.stage, p.order, p.was_given) == alike]
    return sorted(same), first


def stand_out(testimonies: Sequence[Testimony], number: str) -> tuple[list[int], list[int]]:
    """The samples that stand out most of a step's, and the ranks that read them.

    They are those above the widest gap between neighbours in the upper half.
    """
    of_sample: dict[int, float] = {}
    readers: dict[int, set[int]] = {}
    for said in testimonies:
        for sample, height in zip(said.samples.get(number, []), said.heights.get(number, []), strict=True):
            of_sample[sample] = max(of_sample.get(sample, 0.0), height)
            readers.setdefault(sample, set()).add(said.rank)
    if not of_sample:
        return [], []
    ordered = sorted(of_sample.values())
    upper = [height for height in ordered if height >= median(ordered)]
    gaps = [(b - a, b) for a, b in pairwise(upper)]
    least = max(gaps)[1] if gaps else ordered[-1]
    chosen = sorted(sample for sample, height in of_sample.items() if height >= least)[:MOST_SAMPLES]
    return chosen, sorted({rank for sample in chosen for rank in readers[sample]})


def grown_most(norms: Mapping[str, float], usual: Mapping[str, float]) -> str | None:
    """The parameter whose gradient norm is the largest multiple of its usual one; None: nothing is known."""
    known = {name: norm / usual[name] for name, norm in norms.items() if usual.get(name, 0.0) > 0}
    return max(known, key=lambda name: known[name]) if known else None


def numbered(samples: Collection[int]) -> str:
    """Sample numbers for people, at most eight."""
    shown = ", ".join(map(str, list(samples)[:8]))
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return f"sample{'s' if len(samples) > 1 else ''} {shown}{more}"
