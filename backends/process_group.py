"""Joining and leaving the job: who this rank is, read from the environment that torchrun and its kin set."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from octofold.backends.base import Backend
from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """A process's place in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment() -> "RankInfo":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a process without them is a world of one."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        return RankInfo(
            rank=int(os.environ.get("RANK", 0)),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )

    @staticmethod
    def of_one_machine() -> "RankInfo":
        """The place in the default process group of a job whose ranks all stand on this machine."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return RankInfo(rank, ranks, rank, ranks)


@contextmanager
def joined(backend: Backend, config: BackendConfig, info: RankInfo) -> Iterator[None]:
    """The default process group, made on entry and destroyed on exit.

    A world of one has a process group too, so that sharded parameters and checkpoints take one path.

    Raises:
        ConfigError: the rendezvous address is missing, or the environment contradicts `config`.
    """
    store: dist.Store
    if info.world_size == 1:
        store = dist.HashStore()
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        shown = f"WORLD_SIZE={info.world_size}"
        rule = "several ranks meet at MASTER_ADDR:MASTER_PORT, which are not both set"
        raise ConfigError("MASTER_ADDR", shown, rule, "start the ranks with torchrun, or with launch.nproc_per_node")
    else:
        store = _meet(info, timedelta(seconds=config.timeout_s))
    enter_group(backend, config, info, store)
    try:
        yield
    finally:
        dist.destroy_process_group()


def enter_group(backend: Backend, config: BackendConfig, info: RankInfo, store: dist.Store) -> None:
    """Take the device and make the default process group with the ranks that meet at `store`. Collective.

    Raises:
        ConfigError: the device is not there, or the environment contradicts `config`.
    """
    backend.set_up(info.local_rank, info.local_world_size, config.threads)
    timeout = backend.prepare_groups(config)
    dist.init_process_group(
        backend.process_groups(), rank=info.rank, world_size=info.world_size, store=store, timeout=timeout
    )


def _meet(info: RankInfo, timeout: timedelta) -> dist.Store:
    """Where the ranks of this attempt exchange their addresses.

    An elastic agent that starts the ranks again lends them the store of the attempt before, and a rank that reads an
    address there before its peer has replaced it calls for ever at a closed door.
    """
    store, _, _ = next(dist.rendezvous("env://", rank=info.rank, world_size=info.world_size, timeout=timeout))
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}_of_{info.world_size}", store)
