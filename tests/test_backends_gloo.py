"""All gloo groups of a process share one device: one thread that polls, however many groups."""

from pathlib import Path

import torch
import torch.distributed as dist

from octofold.backends import gloo


def polling_threads() -> int:
    return sum(task.read_text() == "gloo_tcp_loop\n" for task in Path("/proc/self/task").glob("*/comm"))


def sums_of_groups() -> tuple[list[float], int, str]:
    """Sums over groups of all ranks and of pairs; how many more threads poll then; the groups' backend."""
    before = polling_threads()
    groups = [dist.new_group() for _ in range(3)]
    pair, _ = dist.new_subgroups(2)
    sums = []
    for group in [*groups, pair]:
        total = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(total, group=group)
        sums.append(float(total))
    return sums, polling_threads() - before, dist.get_backend(pair)


def test_groups_share_one_device(ranks):
    told = ranks(4).run(sums_of_groups)
    assert [sums for sums, _, _ in told] == [[6.0, 6.0, 6.0, pair] for pair in (1.0, 1.0, 5.0, 5.0)]
    assert {(threads, name) for _, threads, name in told} == {(0, gloo.NAME)}


def test_a_world_of_one_uses_it_too(world_of_one):
    # A device of torch's own would be a second thread.
    before = polling_threads()
    dist.new_group()
    assert polling_threads() == before


def test_registering_twice_is_harmless():
    assert gloo.register() == gloo.register() == gloo.NAME
