"""What the agents of a job's nodes tell each other in one attempt: that they live, what failed, what follows from it.

All goes through the store where they meet. The first node, in the order of ranks, leads: it compares what the others
report, and says whether ranks are started again. A thread of its own talks to the store, so that an agent whose link is
cut still ends its ranks in time.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store

from octofold.launch.rendezvous import MeetingError

ALIVE = "octofold/alive"
"""In the job's store: a number that grows while ranks run."""
POLLS_IN_SILENCE = 10
MOST_POLL_S = 1.0
LEAVING_S = 5.0
"""How long the node that has the store waits for the others to have read the last word."""

T = TypeVar("T")
Facts = dict[str, Any]
"""What JSON holds."""


@dataclass
class Seen:
    """What the thread has last read."""

    heard_s: float
    """By the monotonic clock: when the store last answered."""
    alarm: bool = False
    """Some node's ranks have failed, or a node is lost."""
    lost: tuple[int, ...] = ()
    """Nodes that have been silent for too long; the leader sees all, the others only the leader."""
    verdict: dict[str, Any] | None = None
    accounts: dict[int, Any] = field(default_factory=dict)
    """Node -> what it said as `account/NODE`; read by the leader once there is an alarm."""
    stop: int | None = None
    """The signal that a node without ranks was sent, for those that have some."""
    done: int = 0
    """How many nodes' ranks have all succeeded."""


class Exchange:
    """One attempt's conversation between `nodes` agents."""

    def __init__(
        self, store: Store, job: Store, node: int, nodes: int, lost_after_s: float, *, hosts_store: bool
    ) -> None:
        """
        Args:
            store: of this attempt alone.
            job: of all attempts; a connection that nobody else uses.
            node: this node's number in this attempt; 0 leads.
            lost_after_s: a node that is silent for so long is lost.
            hosts_store: the store lives in this process.
        """
        self.node, self.nodes, self._lost_after_s = node, nodes, lost_after_s
        self._store, self._job, self._hosts_store = store, job, hosts_store
        self._poll_s = min(MOST_POLL_S, lost_after_s / POLLS_IN_SILENCE)
        self._words: dict[str, str] = {}
        self._lock, self._left = threading.Lock(), threading.Event()
        self._seen = Seen(time.monotonic())
        self._beats: dict[int, tuple[int, float]] = {}
        self.running: tuple[int, ...] = tuple(range(nodes))
        """The nodes that run ranks, in the order of these; the leader need not be one. Told by the answer."""
        self._thread = threading.Thread(target=self._talk, name="octofold-exchange", daemon=True)

    @property
    def leads(self) -> bool:
        """Whether this node compares and decides."""
        return self.node == 0

    def enter(
        self, told: Facts, answer: Callable[[list[Facts]], Facts], take: Callable[[Facts], str | None], timeout_s: float
    ) -> list[str]:
        """Tell the leader of this node, take its answer, and return what stands in the way; the thread begins then.

        Args:
            told: of this node.
            answer: called on the leader with what all have told; `running` of it, where it is there, names the nodes
                that run ranks.
            take: called on every node with the answer; returns what is wrong with it here.
            timeout_s: for all to be heard, and for the answer.

        Returns:
            What `take` found wrong, of all nodes, the same on every one.

        Raises:
            MeetingError: a node does not tell, or the leader does not answer, within the time.
        """
        limit = timedelta(seconds=timeout_s)

        def gather(kind: str) -> list[Any]:
            keys = [f"{kind}/{node}" for node in range(self.nodes)]
            self._store.wait(keys, limit)
            return [json.loads(text) for text in self._store.multi_get(keys)]

        def said(key: str) -> Any:
            self._store.wait([key], limit)
            return json.loads(self._store.get(key))

        def talk() -> list[str]:
            self._store.set(f"beat/{self.node}", "0")
            self._store.set(f"node/{self.node}", json.dumps(told))
            if self.leads:
                self._store.set("answer", json.dumps(answer(gather("node"))))
            told_back = said("answer")
            self.running = tuple(told_back.get("running", self.running))
            self._store.set(f"ready/{self.node}", json.dumps(take(told_back)))
            if self.leads:
                self._store.set("problems", json.dumps([problem for problem in gather("ready") if problem]))
            problems: list[str] = said("problems")
            return problems

        try:
            found = bounded(talk, timeout_s + 1.0)
        except (RuntimeError, TimeoutError) as error:  # DistStoreError and its kin
            rule = f"nodes tell each other of themselves before ranks start: {str(error).splitlines()[0]}"
            remedy = "see that all nodes run, and that their links do"
            raise MeetingError(f"the other nodes did not answer\n  rule:   {rule}\n  remedy: {remedy}") from error
        self._seen.heard_s = time.monotonic()
        self._thread.start()
        return found

    @property
    def seen(self) -> Seen:
        """What is known of the others."""
        with self._lock:
            return Seen(**vars(self._seen))

    @property
    def silent(self) -> bool:
        """Whether the store has not answered for too long."""
        return time.monotonic() - self.seen.heard_s > self._lost_after_s

    @property
    def troubled(self) -> bool:
        """Whether this attempt is over for a reason that lies elsewhere."""
        seen = self.seen
        return seen.alarm or bool(seen.lost) or self.silent

    def say(self, key: str, value: Any) -> None:
        """Have the thread tell something, such as an account of this node's failure."""
        with self._lock:
            self._words[key] = json.dumps(value)

    def leave(self) -> None:
        """End the conversation once what was said has been told; who has the store stays until all have left."""
        if not self._thread.is_alive():
            return
        deadline_s = time.monotonic() + LEAVING_S

        def told() -> bool:
            with self._lock:
                return not self._words

        while not told() and not self.silent and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self._left.set()
        self._thread.join(1.0)
        if self.silent or self._thread.is_alive():
            return

        def others_left() -> None:
            count = self._store.add("left", 1)
            while self._hosts_store and count < self.nodes - len(self._seen.lost):
                time.sleep(0.05)
                count = self._store.add("left", 0)

        with suppress(RuntimeError, TimeoutError):  # nothing is owed to nodes that do not leave
            bounded(others_left, LEAVING_S)

    def _talk(self) -> None:
        beat = 0
        while not self._left.is_set():
            beat += 1
            with suppress(RuntimeError):  # DistStoreError and its kin: the store's process has ended, or the link has
                self._turn(beat)
            self._left.wait(self._poll_s)

    def _turn(self, beat: int) -> None:
        store = self._store
        with self._lock:
            words = dict(self._words)
        for key, value in words.items():
            if key == "done":
                store.add(key, 1)
            else:
                store.set(key, value)
            with self._lock:
                self._words.pop(key)
        store.set(f"beat/{self.node}", str(beat))
        if self.leads:
            self._job.add(ALIVE, 1)
        alarm = store.check(["alarm"])
        verdict = json.loads(store.get("verdict")) if store.check(["verdict"]) else None
        stop = int(store.get("stop")) if store.check(["stop"]) else None
        done = store.add("done", 0)
        # Who stands by may go.
        watched = [node for node in self.running if node] if self.leads else [0]
        beats = store.multi_get([f"beat/{node}" for node in watched]) if watched else []
        now_s = time.monotonic()
        for node, text in zip(watched, beats, strict=True):
            if node not in self._beats or self._beats[node][0] != int(text):
                self._beats[node] = (int(text), now_s)
        lost = tuple(node for node, (_, heard_s) in self._beats.items() if now_s - heard_s > self._lost_after_s)
        accounts = self._read_accounts() if self.leads and (alarm or lost) else {}
        with self._lock:
            self._seen = Seen(now_s, alarm, lost, verdict, accounts, stop, done)

    def _read_accounts(self) -> dict[int, Any]:
        keys = {node: f"account/{node}" for node in range(self.nodes)}
        return {node: json.loads(self._store.get(key)) for node, key in keys.items() if self._store.check([key])}


def bounded(work: Callable[[], T], seconds: float) -> T:
    """The result of `work`, which may wait on a connection that a cut link holds for a quarter of an hour.

    Raises:
        TimeoutError: it takes longer; it goes on by itself, unheard.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed on to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def of_attempt(store: Store, attempt: str) -> Store:
    """A connection of its own to the part of a store that belongs to one attempt."""
    return PrefixStore(f"octofold/{attempt}", store.clone())  # type: ignore[attr-defined]
