"""Fixtures that many tests share: warm ranks, a world of one, poisoned memory; and hypothesis without chance."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.process_group import RankInfo, joined
from octofold.parallel.local_ranks import LocalRanks
from octofold.train.config import RunConfig
from octofold.train.layout.facts import RankFacts
from octofold.train.layout.prove import IMPORTS, facts, one_rank

settings.register_profile("octofold", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("octofold")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tensors here are tiny, and how a sum is split over threads decides its last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _heard_signals() -> Iterator[None]:
    """Tests in the background (nohup, `&` in a script) are told to ignore some, and so would be all that they start."""
    ignored = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], LocalRanks]]:
    """`ranks(n)`: n processes in a gloo group, the same ones for the whole session."""
    warm: dict[int, LocalRanks] = {}
    yield lambda n: warm.setdefault(n, LocalRanks(n, IMPORTS))
    for started in warm.values():
        started.close()


@pytest.fixture(scope="session")
def layout_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the text that proofs of layouts read."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def alone(ranks: Callable[[int], LocalRanks], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankFacts]:
    """`alone(config)`: what one rank sees of a run, computed once for all its layouts."""
    known: dict[str, RankFacts] = {}

    def of(config: RunConfig) -> RankFacts:
        single = one_rank(config)
        if (key := repr(single)) not in known:
            (known[key],) = facts(single, 1, tmp_path_factory.mktemp("alone"), ranks)
        return known[key]

    return of


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """A default process group of this process alone."""
    with joined(CpuBackend(), BackendConfig(threads=1), RankInfo()):
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and its kin hand out holds NaN, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
