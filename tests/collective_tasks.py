"""What ranks do in the tests of backends/: collectives by every way, their costs, sums by steps."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from octofold.backends import observing
from octofold.backends.accounting import Accounting, over_ranks
from octofold.backends.collectives import (
    all_gather_bytes,
    all_gather_stack,
    all_reduce_sum,
    exchange_rows,
    reduce_scatter_stack,
    send_and_receive,
    world,
)
from octofold.backends.errors import ConfigError
from octofold.backends.flight import KEPT, FlightRecorder
from octofold.backends.hierarchical import sums_taken
from octofold.backends.links import measure_links
from octofold.backends.observing import Call, group_name, observed
from octofold.backends.topology import Topology
from octofold.train.build import draft_model
from octofold.train.config import RunConfig

WIDTH = 4


@dataclass
class Seen:
    """An observer that notes names, and the seconds of each call once it is complete."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    """Group and collective."""
    durations_s: list[float] = field(default_factory=list)

    def on_call(self, call: Call) -> Callable[[float], None]:
        """Note a call."""
        self.calls.append((group_name(call.group), call.op))
        return self.durations_s.append


def seen_of(act: Callable[[], Any]) -> Seen:
    """What is seen of `act`."""
    seen = Seen()
    with observed(seen):
        act()
    dist.barrier()
    return seen


def fsdp_step() -> Seen:
    """Forward and backward of two sharded layers."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data_replicate", "data_shard"))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    for module in (*model, model):
        sharded = fully_shard(module, mesh=mesh["data_shard"])
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return seen_of(lambda: model(torch.ones(2, WIDTH)).sum().backward())


def redistribution() -> Seen:
    """A DTensor gathered forward; its gradient is scattered backward."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("context", "tensor"))["tensor"]
    x = distribute_tensor(torch.ones(8, WIDTH), mesh, [Shard(0)], src_data_rank=None).requires_grad_()

    def act() -> None:
        whole = x.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Shard(0)])
        (whole * 2).sum().backward()
        summed = functional.all_reduce(torch.ones(3), "sum", mesh.get_group())
        assert float((summed + 0)[0]) == dist.get_world_size()

    return seen_of(act)


def pipeline_step() -> Seen:
    """GPipe over two stages and two micro-batches, forward and backward."""
    rank = dist.get_rank()
    group = dist.new_group(group_desc="pipeline")
    shape = torch.empty(1, WIDTH, requires_grad=True)
    stage = PipelineStage(
        nn.Linear(WIDTH, WIDTH), rank, 2, torch.device("cpu"), input_args=(shape,), output_args=(shape,), group=group
    )
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: (y - target).square().sum())
    if rank == 0:
        return seen_of(lambda: schedule.step(torch.ones(2, WIDTH)))
    return seen_of(lambda: schedule.step(target=torch.ones(2, 1)))


def own_exchange() -> Seen:
    """An uneven all-to-all over a group with a name of its own."""
    rank = dist.get_rank()
    group = dist.new_group(group_desc="expert")
    counts = [1, 2] if rank == 0 else [2, 1]

    def act() -> None:
        if rank == 1:
            time.sleep(0.1)
        exchange_rows(torch.ones(3, WIDTH), counts, counts, group)

    return seen_of(act)


def after_observing() -> Seen:
    """What an observer is told once its context has ended: nothing."""
    seen = seen_of(lambda: dist.all_reduce(torch.ones(2)))
    dist.all_reduce(torch.ones(2))
    return seen


def lone_messages() -> Seen:
    """A batch of messages between two ranks, and one send."""
    rank, x = dist.get_rank(), torch.ones(5)

    def act() -> None:
        peer = 1 - rank
        messages = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, torch.empty(5), peer)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
            assert work.wait(), "waiting again is allowed"
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0)

    return seen_of(act)


def works_left(most: int, messages: int) -> tuple[int, int, int]:
    """How many works are kept before and after they are waited for, and how many of them were timed."""
    rank = dist.get_rank()
    with patch.object(observing, "MOST_UNWAITED", most), observed(seen := Seen()):
        works = [dist.isend(torch.ones(5), 1) if rank == 0 else dist.irecv(torch.empty(5), 0) for _ in range(messages)]
        kept = len(observing._unwaited)
        for work in works:
            assert work is not None
            work.wait()
    assert len(seen.calls) == messages
    return kept, len(observing._unwaited), len(seen.durations_s)


def routes_of(config: RunConfig) -> set[str]:
    """The kinds of routes to experts that a drafted model has."""
    model = draft_model(config, torch.device("cpu"), config.model.vocab_size).model
    routes = [module.run_experts for module in model.modules() if hasattr(module, "run_experts")]
    return {type(route).__name__ for route in routes}


# --- sums, messages, costs -------------------------------------------------------------------------------------------


def group_of(members: list[int]) -> None:
    """Make a group of some ranks."""
    dist.new_group(members)


def hierarchical(values: list[torch.Tensor], topology: Topology) -> torch.Tensor | str:
    """`values[rank]` summed in steps; a refusal's text."""
    rank = dist.get_rank()
    own = values[rank].clone()
    try:
        with sums_taken("hierarchical", topology):
            summed = all_reduce_sum(own)
    except ConfigError as error:
        return str(error)
    assert summed.data_ptr() == own.data_ptr(), "in place"
    flat = all_reduce_sum(values[rank].clone())
    torch.testing.assert_close(summed, flat, rtol=1e-12, atol=0)
    return summed


def texts(own: list[bytes]) -> list[bytes]:
    """All ranks' texts."""
    return all_gather_bytes(own[dist.get_rank()], torch.device("cpu"))


def round_trip() -> list[list[float]]:
    """Each rank sends two messages to the next and gets two from the rank before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent = [(torch.full((n,), float(rank)), (rank + 1) % ranks) for n in (1, 3)]
    received = [(torch.empty(n), (rank - 1) % ranks) for n in (1, 3)]
    send_and_receive(sent, received, world())
    send_and_receive([], [], world())
    return [x.tolist() for x, _ in received]


def stacks(x_RRN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """all_gather_stack of this rank's first row, and reduce_scatter_stack of its rows."""
    own_RN = x_RRN[dist.get_rank()].contiguous()
    return all_gather_stack(own_RN[0].contiguous(), world()), reduce_scatter_stack(own_RN, world())


def costs(topology: Topology, steps: int) -> dict[str, dict[str, Any]]:
    """Of a few calls over all ranks and over pairs, over nodes of two."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([0, 1], group_desc="first pair"), dist.new_group([2, 3], group_desc="second pair")]
    accounting = Accounting(topology)
    with observed(accounting):
        exchange_rows(torch.zeros(ranks, 3), [1] * ranks, [1] * ranks, world())
        all_reduce_sum(torch.zeros(8))
        all_gather_stack(torch.zeros(2), world())
        dist.broadcast(torch.zeros(5), 1)
        dist.all_reduce(torch.zeros(2), group=pairs[rank // 2])
    taken = accounting.take()
    assert not accounting.take()
    return over_ranks(taken, steps, torch.device("cpu"))


def record_flight(late_s: float) -> dict[str, Any]:
    """A flight of sums and two messages; rank 1 is late for the first sum, and rank 0 reports `meanwhile`."""
    rank = dist.get_rank()
    flight = FlightRecorder(rank)
    dist.barrier()
    reports: list[dict[str, Any]] = []
    with observed(flight):
        if rank == 1:
            time.sleep(late_s)
        else:
            threading.Timer(late_s / 2, lambda: reports.append(flight.report())).start()
        dist.all_reduce(torch.ones(3))
        in_flight_s = flight.in_flight_s()
        for _ in range(2):
            if rank == 0:
                dist.send(torch.ones(2), 1)
            else:
                dist.recv(torch.ones(2), 0)
        for _ in range(2 + KEPT):
            dist.all_reduce(torch.ones(3))
        deadline_s = time.monotonic() + 10
        while flight.report()["recent"][-1]["done"] is not True and time.monotonic() < deadline_s:
            time.sleep(0.01)  # another thread tells
    return {"report": flight.report(), "meanwhile": (reports or [None])[0], "in_flight_s": in_flight_s}


def links(ranks_per_node: int) -> list[tuple[tuple[int, ...], str]]:
    """Between which nodes collectives were timed."""
    times = measure_links(Topology(ranks_per_node, ranks_per_node), torch.device("cpu"), 1 << 12)
    return [(time.nodes, time.collective) for time in times if time.seconds > 0 and time.bytes_per_s > 0]
