"""Ranks on this machine, started once and kept warm: what proofs of layouts run on.

Each rank is a process of its own, joined to the others in a group (of gloo, by default). What it is asked and
answers is pickled, between these processes alone; no pickle is read from a file.
"""

import faulthandler
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any

import torch.distributed as dist

from octofold.backends.config import BackendConfig
from octofold.backends.process_group import RankInfo, enter_group
from octofold.backends.registry import resolve

START_TIMEOUT_S = 120.0
"""Each process imports torch first, which takes seconds on a busy machine."""
GRACE_S = 0.5
"""After the first failure: how long to listen for the one that caused it (a killed rank breaks its peers' calls)."""

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a rank print the stacks of its threads."""
HOST = "127.0.0.1"
STREAMS = (1, 2)
"""Descriptors of stdout and stderr."""
CPUS = BackendConfig(name="cpu", threads=1, timeout_s=1800.0)
"""What ranks are by default; how a sum is split over threads decides its last bits."""


class RankError(RuntimeError):
    """A function failed, a process died or a call hung on some rank; the ranks have been ended."""


class LocalRanks:
    """`ranks` processes, started by the first `run`, ended by `close` or with the process that owns them.

    Args:
        ranks: how many.
        imports: modules that the ranks will need, imported once in a server that the ranks are forked from: each would
            take seconds over them. This process has one such server, which imports what it was first asked to.
            Without them, each rank is a fresh interpreter, which sees the environment before any module does.
        backend: what they join on.
    """

    def __init__(self, ranks: int, imports: Sequence[str] = (), backend: BackendConfig = CPUS) -> None:
        assert ranks >= 1, ranks
        self.ranks = ranks
        self._backend = backend
        self._imports = list(imports)
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any] | str, *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call `function(*args)` on every rank and return the results in the order of ranks.

        The default process group spans all ranks. It lives as long as the processes: torch caches tensor
        layouts with their groups, so a group that came back under another name would be taken for an old one.

        Args:
            function: importable by the ranks, which inherit `sys.path`; or its name as ``package.module:function``.
            args: picklable, as the results must be.
            timeout_s: for the call; starting the processes is not counted.

        Raises:
            RankError: an exception on a rank (with its traceback), a rank that died, or no result in time. All
                processes have been ended then, and the next call starts new ones.
        """
        request = pickle.dumps((function, args))
        if not self._processes or not all(process.is_alive() for process in self._processes):
            self.close()
            self._start()
        for connection in self._connections:
            # A rank that has just died is noticed, and named, below.
            with suppress(BrokenPipeError):
                connection.send_bytes(request)
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        return self._gather(name, timeout_s)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None

    def _start(self) -> None:
        context: ForkServerContext | SpawnContext = get_context("spawn")
        if self._imports:
            context = get_context("forkserver")
            context.set_forkserver_preload(self._imports)
        # Port 0: a free one. Here and not on rank 0, so that a failing rank takes nothing from the others.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            # The server was started with the environment and the streams of another moment.
            place = dict(os.environ), [_Stream(number) for number in STREAMS]
            arguments = (theirs, rank, self.ranks, self._store.port, self._backend, *place)
            # Daemons: a parent that forgets to close ends them when it exits.
            process = context.Process(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
            self._connections.append(ours)
            process.start()
            theirs.close()
            self._processes.append(process)
        self._gather("the start", START_TIMEOUT_S)

    def _gather(self, what: str, timeout_s: float) -> list[Any]:
        """One answer from each rank; ends all processes when that fails, or when the caller is interrupted."""
        try:
            answers, died = self._listen(time.monotonic() + timeout_s)
            if failure := self._failure(what, timeout_s, answers, died):
                raise RankError(failure)
        except BaseException:
            self.close()
            raise
        return [answers[rank][1] for rank in range(self.ranks)]

    def _listen(self, deadline_s: float) -> tuple[dict[int, tuple[bool, Any]], list[int]]:
        """Answers (succeeded, value) by rank in order of arrival, and ranks that died without one."""
        answers: dict[int, tuple[bool, Any]] = {}
        died: list[int] = []
        while len(answers) + len(died) < self.ranks and (left_s := deadline_s - time.monotonic()) > 0:
            waiting = [rank for rank in range(self.ranks) if rank not in answers and rank not in died]
            # The end of a process closes its connection, which makes it ready too.
            ready = wait([self._connections[rank] for rank in waiting], left_s)
            for rank in (rank for rank in waiting if self._connections[rank] in ready):
                try:
                    answers[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    died.append(rank)
            if died or not all(succeeded for succeeded, _ in answers.values()):
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        return answers, died

    def _failure(self, what: str, timeout_s: float, answers: dict[int, tuple[bool, Any]], died: list[int]) -> str:
        """What went wrong, most telling first; empty if nothing did."""
        told = []
        for rank in died:
            self._processes[rank].join()
            code = self._processes[rank].exitcode or 0
            how = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
            told.append(f"rank {rank} of {self.ranks} died {how} during {what}")
        for rank, (succeeded, text) in answers.items():
            if not succeeded:
                told.append(f"rank {rank} of {self.ranks} failed in {what}:\n{text}")
        silent = [rank for rank in range(self.ranks) if rank not in answers and rank not in died]
        if silent and not told:
            for rank in silent:
                pid = self._processes[rank].pid
                assert pid is not None
                os.kill(pid, STACKS_SIGNAL)
            time.sleep(GRACE_S)
            told.append(
                f"rank(s) {silent} of {self.ranks} gave no result of {what} within timeout_s={timeout_s:g}; "
                "where they were stands on stderr"
            )
        return "\n".join(told)


class _Stream:
    """A descriptor of this process, which arrives in another as the number it has there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _received, (DupFd(self._number),)


def _received(descriptor: Any) -> int:
    number: int = descriptor.detach()
    return number


def _serve(
    connection: Connection,
    rank: int,
    ranks: int,
    port: int,
    backend: BackendConfig,
    environment: dict[str, str],
    streams: list[int],
) -> None:
    """Life of a rank: join, then answer requests until the connection or the parent ends."""
    os.environ.clear()
    os.environ.update(environment)
    for number, given in zip(STREAMS, streams, strict=True):
        # A fresh interpreter has inherited them under their own numbers.
        if given != number:
            os.dup2(given, number)
            os.close(given)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches the whole terminal group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # a crash says where
    faulthandler.register(STACKS_SIGNAL)
    enter_group(resolve(backend.name), backend, RankInfo(rank, ranks, rank, ranks), dist.TCPStore(HOST, port))
    connection.send_bytes(pickle.dumps((True, None)))
    with suppress(EOFError):
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))


def _answer(request: bytes) -> bytes:
    """(True, result) or (False, traceback text), pickled. Tensors travel as bytes, not through shared memory."""
    try:
        function, args = pickle.loads(request)
        if isinstance(function, str):
            module, _, name = function.partition(":")
            function = getattr(import_module(module), name)
        return pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001 - not hidden: raised again in the caller, whatever it is (pytest's are odd)
        return pickle.dumps((False, traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that was killed could not end its ranks, and a rank in a collective reads no connection."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
