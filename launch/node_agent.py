"""The agent of one of several nodes: what fails on one ends the attempt on all, and all start again together."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, Worker, WorkerGroup, WorkerState
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)

from octofold.backends.errors import UserError
from octofold.launch.agent import FAILURE_GRACE_S, MONITOR_INTERVAL_S, RankAgent
from octofold.launch.config import LaunchConfig
from octofold.launch.console import Follower
from octofold.launch.exchange import ALIVE, MOST_POLL_S, Exchange, bounded, of_attempt
from octofold.launch.failures import Failure, clear_notes, first_failure
from octofold.launch.members import least_nodes
from octofold.launch.rendezvous import Meeting, MeetingError
from octofold.launch.restart import UNTRIED

GATHERING = "octofold/gathering"
"""In the job's store: how often nodes have met."""
MOST_SKEW_S = 5.0
SPARE_S = 30.0
"""What a meeting may take beyond its own limit before its connection is taken for cut."""


def problems_error(problems: list[str]) -> UserError:
    """That nodes do not begin, and what stands in the way; each problem begins with its exit status, on a line."""
    statuses, messages = zip(*(problem.split("\n", 1) for problem in problems), strict=True)
    error = UserError("\n".join(dict.fromkeys(messages)))
    error.status = max(map(int, statuses))
    return error


class NodeAgent(RankAgent):
    """`RankAgent` that agrees with those of the other nodes.

    The node of rank 0 leads. Any node raises the alarm; then all end their ranks and give account, and the leader says
    which failure came first and whether another attempt is worth it.
    """

    def __init__(
        self,
        launch: LaunchConfig,
        run_dir: Path,
        meeting: Meeting,
        told: dict[str, Any],
        answer: Callable[[list[dict[str, Any]]], dict[str, Any]],
        take: Callable[[dict[str, Any]], str | None],
    ) -> None:
        """
        Args:
            told: of this node, `name` among it.
            answer: called on the leader with what all nodes told, before ranks start.
            take: called on every node with the leader's answer; returns what is wrong with it here.
        """
        super().__init__(launch, run_dir, meeting, meeting.address, ("logged",))
        self._meeting, self._launch, self._told_of = meeting, launch, told
        self._answer, self._take = answer, take
        self._exchange: Exchange | None = None
        self.left_early = False
        """Whether this node went while others run ranks."""
        self._names: list[str] = []
        self._ran: list[str] = []
        self._left_out: dict[str, str] = {}
        self._rounds = 0
        self._follower: Follower | None = None

    def name_of(self, rank: int) -> str:
        """The node on which a rank runs."""
        assert self._exchange is not None
        return self._names[self._exchange.running[rank // self._launch.nproc_per_node]]

    def _ranks_of(self, node: int) -> range:
        assert self._exchange is not None
        each, running = self._launch.nproc_per_node, self._exchange.running
        place = running.index(node) if node in running else None
        return range(0) if place is None else range(place * each, (place + 1) * each)

    @property
    def _stands_by(self) -> bool:
        """Whether this node runs no ranks in this attempt."""
        return self._exchange is not None and self._exchange.node not in self._exchange.running

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._close()
        arrived = self._arrive()
        self._meet(worker_group, arrived, super()._rendezvous)
        assert worker_group.store is not None
        assert worker_group.group_rank is not None
        static = self._launch.rendezvous.backend == "static"
        store = of_attempt(worker_group.store, str(self._rounds if static else 0))
        self._rounds += 1
        lost_after_s = self._launch.rendezvous.lost_after_s
        met = worker_group.group_world_size
        assert met is not None
        job = self._meeting.store.clone()
        self._exchange = exchange = Exchange(
            store, job, worker_group.group_rank, met, lost_after_s, hosts_store=self._meeting.hosts_store
        )
        problems = exchange.enter(self._told_of, self._lead_in, self._enter, self._launch.rendezvous.timeout_s)
        if problems:
            raise problems_error(problems)
        self._deal_out(worker_group, exchange)
        if exchange.leads:
            job.add(GATHERING, 1)
        own = self._ranks_of(exchange.node)
        clear_notes(self._logs, own)
        self._follower = (self._follower or Follower(self._logs / "rank_0.log")) if 0 in own else None

    def _deal_out(self, worker_group: WorkerGroup, exchange: Exchange) -> None:
        """Number the ranks by the order in which nodes run some: torch has numbered those of all nodes, as they met.

        They meet at the leader's, whether it runs any of them or not.
        """
        own, total = self._ranks_of(exchange.node), len(exchange.running) * self._launch.nproc_per_node
        group: Any = worker_group  # torch annotates its fields with what they begin with, None
        group.group_world_size = len(exchange.running)
        if own:
            group.group_rank = exchange.running.index(exchange.node)
        worker_group.workers = [
            Worker(local_rank=local, global_rank=rank, role_rank=rank, world_size=total, role_world_size=total)
            for local, rank in enumerate(own)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._stands_by:
            self._pcontext = None
            return {}
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _exit_barrier(self) -> None:
        """Torch's would wait for nodes that stand by, or are lost; here all know that all are done (`Exchange`)."""

    def _meet(self, worker_group: WorkerGroup, gathering: int, meet: Callable[[WorkerGroup], None]) -> None:
        """Torch's part. Ranks are dealt out anew where a node has met that is not there any more."""
        deadline_s = time.monotonic() + self._launch.rendezvous.timeout_s
        while True:
            try:
                bounded(lambda: meet(worker_group), self._launch.rendezvous.timeout_s + SPARE_S)
                return
            except RendezvousClosedError as error:
                raise MeetingError("the job has ended before this node came to it") from error
            except (RendezvousError, TimeoutError) as error:
                if isinstance(error, RendezvousTimeoutError) and self._job_runs():
                    print(
                        "octofold: the job runs without this node, which waits for its ranks to start again",
                        file=sys.stderr,
                        flush=True,
                    )
                    deadline_s = time.monotonic() + self._launch.rendezvous.timeout_s
                    continue
                raise self._missing(gathering, error) from error
            except RuntimeError as error:  # the store's: a key that the absent node does not write
                if time.monotonic() > deadline_s:
                    raise self._missing(gathering, error) from error

    def _lead_in(self, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        names = [node["name"] for node in nodes]
        for node in nodes:
            if node["name"] in self._left_out:
                node["complaints"].append(self._left_out[node["name"]])
        said = {"names": names, "remaining": self._remaining_restarts, **self._answer(nodes)}
        ran, self._ran = self._ran, [names[number] for number in said.get("running", ())]
        return {**said, "untried": ran != self._ran, "time_s": time.time()}

    def _enter(self, said: dict[str, Any]) -> str | None:
        skew_s = time.time() - said["time_s"]
        if abs(skew_s) > MOST_SKEW_S:
            name = self._told_of["name"]
            print(
                f"octofold: the clock of {name} is {abs(skew_s):.0f} s from that of {said['names'][0]}: synchronise "
                "them (chrony, ntpd), or the order of failures cannot be told",
                file=sys.stderr,
            )
        os.environ[UNTRIED] = "1" if said["untried"] else "0"
        # A node that comes instead of a lost one learns how many attempts have been made.
        self._names, self._remaining_restarts = said["names"], said["remaining"]
        why = said.get("standing_by", {}).get(self._told_of["name"])
        if why is not None:
            print(f"octofold: this node stands by: {why}", file=sys.stderr, flush=True)
        return self._take(said)

    def _job_runs(self) -> bool:
        """Whether ranks run on other nodes."""

        def grows() -> bool:
            before = self._meeting.store.add(ALIVE, 0)
            time.sleep(2 * MOST_POLL_S)
            return self._meeting.store.add(ALIVE, 0) != before

        try:
            return bounded(grows, SPARE_S)
        except (RuntimeError, TimeoutError):
            return False

    def _arrive(self) -> int:
        """Note that this node waits for the others; returns the number of this gathering, the same on all."""
        gathering = self._meeting.store.add(GATHERING, 0)
        number = self._meeting.store.add(f"octofold/arrived/{gathering}", 1)
        self._meeting.store.set(f"octofold/arrived/{gathering}/{number}", str(self._told_of["name"]))
        return gathering

    def _missing(self, gathering: int, error: Exception) -> MeetingError:
        store = self._meeting.store

        def arrived() -> set[str]:
            count = store.add(f"octofold/arrived/{gathering}", 0)
            return {store.get(f"octofold/arrived/{gathering}/{n + 1}").decode() for n in range(count)}

        try:
            here = sorted(bounded(arrived, SPARE_S))
        except (RuntimeError, TimeoutError):
            return MeetingError(self._explained("the store where nodes meet does not answer"))
        away = sorted(set(self._names or self._launch.hosts) - set(here))
        told = f"; missing: {', '.join(away)}" if away else ""
        key = "nodes" if self._launch.min_nodes is None else "min_nodes"
        shown = f"{len(here)} of launch.{key}={least_nodes(self._launch)} came: {', '.join(here)}{told}"
        limit = f"launch.rendezvous.timeout_s={self._launch.rendezvous.timeout_s:g}"
        remedy = "start the others, or see why they do not reach this one"
        return MeetingError(
            f"{shown}\n  rule:   nodes meet within {limit} ({type(error).__name__})\n  remedy: {remedy}"
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        exchange = self._exchange
        assert exchange is not None
        if self._follower:
            self._follower.copy()
        if self._stands_by:
            return self._stand_by(exchange)
        if self.stopped_by is None and (told := exchange.seen.stop) is not None:
            super()._handle(told, None)
        if exchange.troubled and not self._has_failed():
            return self._end_attempt()
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.SUCCEEDED:
            return result
        # The work of all is done once every node says so; until then one may fail, and all begin again.
        exchange.say("done", True)
        while exchange.seen.done < len(exchange.running):
            if exchange.troubled:
                return self._end_attempt()
            time.sleep(MONITOR_INTERVAL_S)
        return result

    def _stand_by(self, exchange: Exchange) -> RunResult:
        """The state of a node that waits to be needed."""
        needed = exchange.leads or self._meeting.hosts_store
        if exchange.seen.done == len(exchange.running):
            return RunResult(WorkerState.SUCCEEDED)
        if self.stopped_by is not None:
            if not needed:
                self.left_early = True
                return RunResult(WorkerState.SUCCEEDED)
            # The job cannot do without this node, and it has no ranks to tell.
            exchange.say("stop", self.stopped_by)
        if not exchange.troubled:
            return RunResult(WorkerState.HEALTHY)
        result = RunResult(WorkerState.FAILED)
        self._decide(result)
        return result

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._stands_by and self.stopped_by is None:
            self.stopped_by = signum
        else:
            super()._handle(signum, frame)

    def _end_attempt(self) -> RunResult:
        """End this node's ranks because of what happened elsewhere."""
        timer = self._kill_later()
        self._stop_workers(self._worker_group)
        timer.cancel()
        result = RunResult(WorkerState.FAILED)
        self._decide(result)
        return result

    def _decide(self, result: RunResult) -> None:
        exchange = self._exchange
        assert exchange is not None
        exchange.say("alarm", True)
        interrupted = self.stopped_by is not None or bool(self.killed_why)
        ranks = self._ranks_of(exchange.node)
        own = first_failure(self._logs, result.failures, interrupted=interrupted, ranks=ranks)
        exchange.say(f"account/{exchange.node}", {"failure": asdict(own) if own else None, "interrupted": interrupted})
        verdict = self._lead(exchange) if exchange.leads else self._follow(exchange)
        self._remaining_restarts = verdict["remaining"]
        failure = Failure(**verdict["failure"]) if verdict["failure"] else None
        if verdict.get("left_out"):
            assert failure is not None
            without = ", ".join(verdict["left_out"])
            print(f"octofold: {failure.message}\noctofold: begins again without {without}", file=sys.stderr, flush=True)
        elif self._remaining_restarts:
            assert failure is not None
            self._tell_restart(failure.message)
        self.failure = failure

    def _lead(self, exchange: Exchange) -> dict[str, Any]:
        """Hear the accounts of all nodes that are not lost, and judge."""
        # A rank that ignores SIGTERM is killed after a while; a node takes no longer, or is lost.
        deadline_s = time.monotonic() + 2 * FAILURE_GRACE_S + self._launch.rendezvous.lost_after_s
        accounts: dict[int, Any] = {}
        while True:
            seen = exchange.seen
            if exchange.silent:
                return self._alone("the store where nodes meet", exchange)
            accounts = seen.accounts
            if set(exchange.running) <= accounts.keys() | set(seen.lost) or time.monotonic() > deadline_s:
                break
            time.sleep(MONITOR_INTERVAL_S)
        failures = [Failure(**account["failure"]) for account in accounts.values() if account["failure"]]
        lost = sorted(set(exchange.running) - accounts.keys())
        first = self._lost(lost) if lost else min(failures, key=lambda failure: failure.time_ns, default=None)
        if first and first.rank is not None:
            first = replace(first, message=f"node {self.name_of(first.rank)}: {first.message}")
        interrupted = any(account["interrupted"] for account in accounts.values())
        again = not interrupted and self._is_worth_restart(first)
        if lost and self._launch.rendezvous.backend == "static":
            again = False
        remaining = self._remaining_restarts if again else 0
        slow = self._without(first, exchange) if first and not interrupted else []
        if slow:
            # The job has not begun, and to begin without them is no restart; torch counts it as one.
            remaining = self._remaining_restarts + 1
        if first:
            rank = first.rank
            node = self.name_of(rank) if rank is not None else None
            self._note_failure(first, node, restarts=bool(remaining) and not slow)
        verdict = {"failure": asdict(first) if first else None, "remaining": remaining, "left_out": slow}
        exchange.say("verdict", verdict)
        return verdict

    def _without(self, failure: Failure, exchange: Exchange) -> list[str]:
        """The names of slow nodes that the job can do without; they stand by from now on."""
        if not failure.slow or len(exchange.running) - len(failure.slow) < least_nodes(self._launch):
            return []
        names = [self._names[exchange.running[number]] for number in failure.slow]
        self._left_out |= dict.fromkeys(names, "its links are slow")
        return names

    def _follow(self, exchange: Exchange) -> dict[str, Any]:
        """Wait for the leader's verdict."""
        while (seen := exchange.seen).verdict is None:
            if exchange.silent or seen.lost:
                return self._alone(f"node {self._names[0]}, which leads,", exchange)
            time.sleep(MONITOR_INTERVAL_S)
        return seen.verdict

    def _alone(self, whom: str, exchange: Exchange) -> dict[str, Any]:
        message = f"{whom} has not been heard of for {self._launch.rendezvous.lost_after_s:g} s"
        return {"failure": asdict(Failure(1, self._explained(message))), "remaining": 0}

    def _lost(self, nodes: list[int]) -> Failure:
        named = [(self._names[node], self._ranks_of(node)) for node in nodes]
        shown = ", ".join(f"{name} ({_spelled(ranks)})" for name, ranks in named)
        limit = f"{self._launch.rendezvous.lost_after_s:g} s"
        return Failure(1, self._explained(f"{'nodes' if len(nodes) > 1 else 'node'} {shown} not heard of for {limit}"))

    @staticmethod
    def _explained(message: str) -> str:
        rule = "every node is heard of within launch.rendezvous.lost_after_s"
        remedy = "see whether that machine and its link run; the newest checkpoint stands"
        return f"{message}\n  rule:   {rule}\n  remedy: {remedy}"

    def _close(self) -> None:
        if self._exchange:
            self._exchange.leave()
            self._exchange = None

    def close(self) -> bool:
        """Leave the conversation; returns whether the store still answers."""
        if self._follower:
            self._follower.copy()
        heard = self._exchange is None or not self._exchange.silent
        self._close()
        return heard


def _spelled(ranks: Sequence[int]) -> str:
    return f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
