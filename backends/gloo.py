"""gloo as CPU ranks join it: one network device for all groups of a process.

By itself, torch gives every gloo group a device of its own, whose thread wakes a hundred times a second: 0.14% of a
core a group. A layout makes some twenty groups, so eight ranks spend a quarter of a core on nothing, and a process that
proves one layout after another soon spends all of it.
"""

from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store

NAME = "gloo_one_device"
"""What `torch.distributed.get_backend` calls these groups; torch keeps the name gloo for its own."""


def register() -> str:
    """Make the backend known to torch, once in a process; returns its name, for `init_process_group`."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _group, devices=["cpu"])
    return NAME


@cache
def _device() -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()


def _group(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [_device()]
    options._timeout = timeout
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_sequence_number_for_group()
    return group
