"""A second group of all ranks, over host memory, for what goes on beside training in a thread of its own.

Calls of two threads on one group would be paired by chance; on two groups they cannot be.
"""

from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from octofold.backends.collectives import Group, world

_groups: WeakKeyDictionary[Group, Group] = WeakKeyDictionary()
"""By default group. One is enough, and each costs a rendezvous."""


def host_group(timeout: timedelta) -> Group:
    """The group, made where there is none yet. Collective.

    Args:
        timeout: of a call; a rank waits in it for what the slowest one does.
    """
    if world() not in _groups:
        # With a device of its own (not backends/gloo.py): two threads then share nothing of gloo's.
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="host")
        assert isinstance(group, dist.ProcessGroup)
        _groups[world()] = group
    return _groups[world()]
