"""torchrun's agent for the ranks of this machine: passes signals on, ends what a failure left, starts ranks again."""

import logging
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry

from octofold.launch.config import LaunchConfig
from octofold.launch.failures import USERS_MISTAKE, Failure, clear_notes, first_failure
from octofold.train.history import append

FAILURE_GRACE_S = 5.0
"""What the other ranks have to end by themselves once one has failed: they may be stuck in a call to it for ever."""
MONITOR_INTERVAL_S = 0.1


class RankAgent(LocalElasticAgent):
    """Starts the ranks of a run that never outlive this process, and leaves their output as it is."""

    def __init__(
        self,
        launch: LaunchConfig,
        run_dir: Path,
        meeting: RendezvousHandler | None = None,
        address: str = "localhost",
        options: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            meeting: where the agents of several nodes meet; None: this one is alone.
            address: of this node, for the others.
            options: further arguments of the ranks (launch/worker.py).
        """
        # Its lines repeat, with tracebacks, what is told at the end in one place.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        # The agent substitutes ${local_rank} in arguments; a dollar in a path must survive that.
        path = str(run_dir).replace("$", "$$")
        spec = WorkerSpec(
            role="rank",
            local_world_size=launch.nproc_per_node,
            rdzv_handler=meeting or _alone(),
            entrypoint=sys.executable,
            args=("-P", "-m", "octofold.launch.worker", path, os.getpid(), *options),
            max_restarts=launch.max_restarts,
            monitor_interval=MONITOR_INTERVAL_S,
            local_addr=address,
        )
        super().__init__(spec, DefaultLogsSpecs(os.devnull), shutdown_timeout=math.ceil(launch.stop_deadline_s))
        self.stopped_by: int | None = None
        """The signal that has been passed on to the ranks."""
        self.killed_why = ""
        self.failure: Failure | None = None
        """Of the last attempt."""
        self._run_dir = run_dir
        self._logs, self._deadline_s, self._max_restarts = run_dir / "logs", launch.stop_deadline_s, launch.max_restarts
        self._told: set[int] = set()

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Pass on SIGINT, SIGTERM, SIGUSR1 and (as SIGTERM; unless nohup ignores it) SIGHUP while the context lasts."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
        before = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) is not signal.SIG_IGN}
        for signum in before:
            signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if not self._pids():
            sys.exit(128 + signum)
        if self.stopped_by is not None:
            # A person's impatience. Schedulers repeat themselves, too; the deadline bounds what they wait for.
            if signum == signal.SIGINT:
                self._kill("ranks killed at the second signal")
            return
        self.stopped_by = signum
        self._pass_on()
        reason = f"ranks killed after launch.stop_deadline_s={self._deadline_s:g}"
        timer = threading.Timer(self._deadline_s, self._kill, [reason])
        timer.daemon = True
        timer.start()

    def _pass_on(self) -> None:
        """Tell the ranks of the signal; those of a new attempt, too, which were not there when it came."""
        assert self.stopped_by is not None
        for pid in set(self._pids()) - self._told:
            self._told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if self.stopped_by == signal.SIGHUP else self.stopped_by)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """The state of the ranks. A failure of one ends the others, and decides whether another attempt is worth it."""
        if self.stopped_by is not None:
            self._pass_on()
        timer = self._kill_later() if self._has_failed() else None
        # Where a rank has failed, this tells the others to end and waits for them.
        result: RunResult = super()._monitor_workers(worker_group)
        if timer is not None:
            timer.cancel()
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._decide(result)
        return result

    def _has_failed(self) -> bool:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        return any(handler.proc.poll() for handler in context.subprocess_handlers.values())

    def _kill_later(self) -> threading.Timer:
        timer = threading.Timer(FAILURE_GRACE_S, kill_groups, [self._pids()])
        timer.daemon = True
        timer.start()
        return timer

    def _decide(self, result: RunResult) -> None:
        interrupted = self.stopped_by is not None or bool(self.killed_why)
        failure = first_failure(self._logs, result.failures, interrupted=interrupted)
        if not self._is_worth_restart(failure):
            self._remaining_restarts = 0
        if failure:
            self._note_failure(failure, None, restarts=bool(self._remaining_restarts))
        if self._remaining_restarts:
            assert failure is not None
            self._tell_restart(failure.message)
            clear_notes(self._logs)
        self.failure = failure

    def _is_worth_restart(self, failure: Failure | None) -> bool:
        """Whether what failed may go well the next time."""
        before = self.failure
        if self.stopped_by is not None or failure is None or failure.status == USERS_MISTAKE:
            return False
        return before is None or failure.cause is None or failure.cause != before.cause

    def _note_failure(self, failure: Failure, node: str | None, *, restarts: bool) -> None:
        """Enter what ended this attempt into the run's history."""
        number = self._max_restarts - self._remaining_restarts + 1 if restarts else None
        with suppress(OSError):  # it is told on the console, too
            append(self._run_dir, "failure", rank=failure.rank, node=node, message=failure.message, restart=number)

    def _tell_restart(self, message: str) -> None:
        number = self._max_restarts - self._remaining_restarts + 1
        print(f"octofold: {message}", file=sys.stderr)
        print(f"octofold: restart {number} of launch.max_restarts={self._max_restarts}", file=sys.stderr, flush=True)

    def _kill(self, reason: str) -> None:
        self.killed_why = self.killed_why or reason
        kill_groups(self._pids())

    def _pids(self) -> list[int]:
        return [worker.id for worker in self.get_worker_group().workers if worker.id]


def _alone() -> RendezvousHandler:
    rendezvous = RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, local_addr="localhost")
    return registry.get_rendezvous_handler(rendezvous)


def kill_groups(pids: list[int]) -> None:
    """Kill ranks that may have ended already. Each leads a process group, which holds its loader processes too."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
