"""Seeing every collective of this process, whoever issues it.

FSDP2, DTensor, pipelining and compiled graphs call torch.distributed by different ways, and some from C++. All of
them end in a few operators of torch's dispatcher, one for each method of a process group (`c10d::allreduce_` ...).
These get a kernel at `BackendSelect`, a stage that every call passes before it comes to its device and that these
operators leave empty. It tells observers of the call and lets it go on. That holds for the whole process (a backward
pass may run in other threads) from the first observer on; before, it costs nothing.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

_OPERATORS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}
"""The operators, and the names that observers are told. Receiving from any rank is left out: nothing here does it."""
_INPUTS = ("input_tensor", "input", "input_tensors", "inputs", "input_list", "tensors", "tensor")
_PEERS = ("dst", "src", "root_rank")
_STAGE = torch._C.DispatchKey.BackendSelect


@dataclass(frozen=True)
class Call:
    """A collective that this process issues."""

    op: str
    group: dist.ProcessGroup
    inputs: list[torch.Tensor]
    """What this rank gives; of `receive`, what it receives into; a barrier's stands for nothing."""
    peer: int | None
    """Rank in the group: whom it is sent to or received from, or the root of a collective that has one."""
    splits: list[int] | None
    """all_to_all of one tensor: rows meant for each rank; empty where they are even."""
    expected: list[int] | None = None
    """all_to_all of one tensor: rows expected from each rank; empty where they are even."""


Told = Callable[[float], object]
"""Takes the seconds that a call took."""


class Observer(Protocol):
    """Is told of calls."""

    def on_call(self, call: Call) -> Told | None:
        """Called before the call is issued.

        Returns:
            What to tell, from any thread, how long it took: from being issued until it was complete, other ranks' delay
            included. Where the library does not say when that is, until its `wait` returned (gloo's messages and
            reduce-scatters); on accelerators, where the host cannot see it, nothing is told.
        """


def group_name(group: dist.ProcessGroup) -> str:
    """The group's name for people: its mesh axis, `world`, or what its maker gave it (`group_desc`)."""
    description = group.group_desc.removeprefix("mesh_")
    return {"default_pg": "world", "undefined": "unnamed", "default": "world"}.get(description, description)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every call in this process until the context ends."""
    _install()
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def unobserved() -> Iterator[None]:
    """Tell nobody of the calls of this thread: of what goes on beside training, on a group of its own."""
    _hidden.value = True
    try:
        yield
    finally:
        _hidden.value = False


_hidden = threading.local()
_observers: list[Observer] = []
_installed: list[torch.library.Library] = []
_unwaited: set[dist.Work] = set()
"""Keeps the works that Python stands behind alive until they are waited for: C++ holds only their C++ half."""
MOST_UNWAITED = 4096
"""Nobody need wait for a work. Where so many are left, further ones are not timed, and not kept."""


def _install() -> None:
    if _installed:
        return
    library = torch.library.Library("c10d", "IMPL")
    for name in _OPERATORS:
        library.impl(name, _kernel(name), _STAGE.name, with_keyset=True)
    _installed.append(library)


def _kernel(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    inputs_at = next(arguments.index(name) for name in _INPUTS if name in arguments)
    group_at = arguments.index("process_group")
    peer_at = next((arguments.index(name) for name in _PEERS if name in arguments), None)
    splits_at = arguments.index("input_split_sizes") if "input_split_sizes" in arguments else None
    expected_at = arguments.index("output_split_sizes") if "output_split_sizes" in arguments else None
    below = torch._C._dispatch_keyset_full_after(_STAGE)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        device = (keyset & below).highestPriorityTypeId()
        if not _observers or getattr(_hidden, "value", False):
            return operator._op_dk(device, *args)
        call = Call(
            _OPERATORS[name],
            dist.ProcessGroup.unbox(args[group_at]),
            _flat(args[inputs_at]),
            None if peer_at is None else args[peer_at],
            None if splits_at is None else args[splits_at],
            None if expected_at is None else args[expected_at],
        )
        told = [tell for observer in _observers if (tell := observer.on_call(call)) is not None]
        began_s = time.perf_counter()
        # By this way and no other the call lets go of Python's lock. Gloo's threads take it when they drop a tensor,
        # while they hold the lock that a new call waits for.
        results = operator._op_dk(device, *args)
        if not told or device != torch._C.DispatchKey.CPU:
            return results
        return _timed(results, lambda: _tell(told, began_s))

    return kernel


def _timed(results: Any, complete: Callable[[], None]) -> Any:
    """The results of an operator, the last or only one a work, that calls `complete` when the work is."""
    *tensors, boxed = results if isinstance(results, tuple) else (results,)
    work = dist.Work.unbox(boxed)
    try:
        work.get_future().add_done_callback(lambda _: complete())
        return results
    except RuntimeError as error:
        # Those of gloo's messages and reduce-scatters have none.
        if "getFuture not implemented" not in str(error):
            raise
    if len(_unwaited) >= MOST_UNWAITED:
        return results
    boxed = _Waited(work, complete).boxed()
    return (*tensors, boxed) if tensors else boxed


def _flat(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for part in tensors for tensor in _flat(part)]


def _tell(told: list[Told], began_s: float) -> None:
    took_s = time.perf_counter() - began_s
    for tell in told:
        tell(took_s)


class _Waited(dist.Work):
    """A work without a future: its first `wait` tells when it is complete."""

    def __init__(self, work: dist.Work, complete: Callable[[], None]) -> None:
        super().__init__()
        self._work, self._complete = work, complete
        _unwaited.add(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self not in _unwaited:
            return True
        done = self._work.wait(timeout)
        _unwaited.remove(self)
        self._complete()
        return done

    def is_completed(self) -> bool:
        return self._work.is_completed()
