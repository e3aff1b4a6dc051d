"""What verifications share: warm ranks, the recipe emulated in small blocks, degrees in words, results as JSON."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from octofold.backends.config import BackendConfig
from octofold.parallel.config import ParallelConfig
from octofold.train.config import PrecisionConfig

if TYPE_CHECKING:
    from octofold.parallel.local_ranks import LocalRanks

SMALL_BLOCK = 16
"""Edge of a quantisation block that tiny matrices have many of."""


@contextmanager
def warm_ranks(backend: BackendConfig) -> "Iterator[Callable[[int], LocalRanks]]":
    """The processes by their number, started on `backend` when first asked for and ended with the context."""
    from octofold.parallel.local_ranks import LocalRanks
    from octofold.train.layout.prove import IMPORTS

    warm: dict[int, LocalRanks] = {}
    try:
        yield lambda ranks: warm.setdefault(ranks, LocalRanks(ranks, IMPORTS, backend))
    finally:
        for started in warm.values():
            started.close()


def emulated(precision: PrecisionConfig) -> PrecisionConfig:
    """An FP8 recipe as CPUs compute it, in blocks that tiny matrices have many of; any other as it is."""
    if not precision.is_fp8:
        return precision
    return replace(precision, arithmetic="emulate", block=min(precision.block, SMALL_BLOCK), watch_every=0)


def degrees(parallel: ParallelConfig) -> str:
    """What is not as by default, as a user would write it."""
    plain_one = asdict(ParallelConfig(data_shard=1))
    return " ".join(f"{name}={value}" for name, value in asdict(parallel).items() if value != plain_one[name])


def plain(value: Any) -> Any:
    """What JSON knows: numbers that are not finite become texts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
