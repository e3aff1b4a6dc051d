"""Whether what several ranks hold copies of is still the same on all of them, bit for bit.

Copies are the shards that replicas of the data hold of parameters and moments, the embedding's copy on the last stage
of a pipeline, and what every rank of a stage has: expert biases, histories of delayed scaling, the counts and the loss
scale that decide the next update. A shard of which there is one has nothing to be compared with.

The tables of what each rank holds are exchanged once; a check is one collective of a fixed size.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from octofold.backends.collectives import all_gather_bytes, all_gather_stack, world
from octofold.train.anomaly.account import Anomaly
from octofold.train.anomaly.bits import checksum
from octofold.train.anomaly.blame import Blame
from octofold.train.anomaly.judge import Finding
from octofold.train.engines.native import NativeEngine

COUNTS = "counts"
"""The entry of what is no tensor."""


@dataclass(frozen=True)
class Odd:
    """Copies that differ."""

    name: str
    ranks: list[int]
    """Whose copy is not that of the most ranks; all holders where no copy has a majority."""


class Replicas:
    """Compares copies. Every method is collective over the world."""

    def __init__(self, engine: NativeEngine, counts: Callable[[], Mapping[str, Any]], device: torch.device) -> None:
        """
        Args:
            counts: what every rank must know alike, as plain values.
            device: of the tensors that ranks exchange.
        """
        self._engine, self._counts, self._device = engine, counts, device
        self._tables: list[list[str]] = []

    def check(self) -> Anomaly | None:
        """The copies that differ, as an anomaly."""
        odd = self.odd()
        if not odd:
            return None
        ranks = sorted({rank for found in odd for rank in found.ranks})
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        return Anomaly(Finding("replicas"), Blame(ranks, odd[0].name + more, None, []), "replicas")

    @torch.no_grad()
    def odd(self) -> list[Odd]:
        """Copies that differ, in the order of names."""
        held = self._held()
        names = list(held)
        if not self._tables:
            self._tables = [json.loads(text) for text in all_gather_bytes(json.dumps(names).encode(), self._device)]
        # What is held does not change as long as tensors keep their places.
        assert self._tables[world().rank()] == names
        sums_N = torch.zeros(max(map(len, self._tables)), dtype=torch.int64, device=self._device)
        sums_N[: len(names)] = torch.stack([make() for make in held.values()])
        of_ranks = all_gather_stack(sums_N, world()).tolist()
        return _differing(self._tables, of_ranks)

    def _held(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What this rank holds: a key that is alike where copies must be -> what makes its checksum."""
        engine = self._engine
        held: dict[str, Callable[[], torch.Tensor]] = {}
        for name, tensor in engine.tensors().items():
            held[f"{name}|{_place(tensor)}"] = partial(self._checksum, tensor)
        copied = engine.ends.copied if engine.ends is not None else None
        if copied is not None:
            named = {id(parameter): name for name, parameter in engine.model.named_parameters()}
            name = named[id(copied)]
            copies = {f"model.{name}": copied.detach()}
            copies |= {f"optim.{name}.{kind}": moment for kind, moment in engine.optimizer.moments(copied).items()}
            for name, tensor in copies.items():
                # A key of its own beside the original's, where both ends are on one rank.
                held[f"{name}|{_place(tensor)}|copy"] = partial(self._checksum, tensor)
        held[f"{COUNTS}|"] = lambda: self._checksum(_encoded(self._counts()))
        return held

    def _checksum(self, tensor: torch.Tensor) -> torch.Tensor:
        return checksum(tensor).to(self._device)


def _differing(tables: list[list[str]], of_ranks: list[list[int]]) -> list[Odd]:
    holders: dict[str, list[tuple[int, int]]] = {}
    for rank, (names, sums) in enumerate(zip(tables, of_ranks, strict=True)):
        for name, found in zip(names, sums, strict=False):
            holders.setdefault(name.removesuffix("|copy"), []).append((rank, found))
    odd = []
    for name, copies in sorted(holders.items()):
        counted = Counter(found for _, found in copies).most_common()
        if len(counted) == 1:
            continue
        majority = counted[0][0] if counted[0][1] > counted[1][1] else None
        ranks = sorted({rank for rank, found in copies if found != majority})
        odd.append(Odd(name.partition("|")[0], ranks))
    return odd


def _place(tensor: torch.Tensor) -> str:
    """Which part of the whole this rank's shard is: its coordinates on the axes that split the tensor."""
    if not isinstance(tensor, DTensor):
        return ""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    split = [not isinstance(placement, Replicate) for placement in tensor.placements]
    return ",".join(str(place) for place, is_split in zip(coordinate, split, strict=True) if is_split)


def _encoded(values: Mapping[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8)
