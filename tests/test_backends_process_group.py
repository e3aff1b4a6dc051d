"""Who a rank is, and the life of the default process group."""

import pytest
import torch
import torch.distributed as dist

from octofold.backends import gloo
from octofold.backends.collectives import all_reduce_sum
from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo, joined

ONE_THREAD = BackendConfig(threads=1)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_a_world_of_one():
    assert RankInfo.from_environment() == RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_a_launchers_variables_are_read(monkeypatch):
    for name, value in zip(VARIABLES, ("5", "8", "1", "4"), strict=False):
        monkeypatch.setenv(name, value)
    assert RankInfo.from_environment() == RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert RankInfo.from_environment().local_world_size == 8, "without it all ranks are taken to be on this machine"


def test_a_world_of_one_has_a_group_while_it_is_joined():
    for _ in range(2):
        with joined(CpuBackend(), ONE_THREAD, RankInfo()):
            assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, gloo.NAME)
            assert all_reduce_sum(torch.tensor([2.0])).tolist() == [2.0]
        assert not dist.is_initialized()


def test_an_error_inside_leaves_no_group():
    with pytest.raises(KeyError), joined(CpuBackend(), ONE_THREAD, RankInfo()):
        raise KeyError
    assert not dist.is_initialized()


@pytest.mark.parametrize("present", [None, "MASTER_ADDR", "MASTER_PORT"])
def test_several_ranks_need_an_address(monkeypatch, present):
    if present:
        monkeypatch.setenv(present, "1")
    with pytest.raises(ConfigError) as caught, joined(CpuBackend(), ONE_THREAD, RankInfo(0, 2, 0, 2)):
        pytest.fail("joined without an address")
    message = str(caught.value)
    assert message.startswith("WORLD_SIZE=2\n  rule:   several ranks meet at MASTER_ADDR:MASTER_PORT")
    assert "torchrun" in caught.value.remedy
    assert not dist.is_initialized()
