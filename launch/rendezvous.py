"""Where the agents of a job's nodes meet: a store on the first node, and torch's rendezvous over it."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistNetworkError, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.addresses import address_towards, resolve
from octofold.launch.config import LaunchConfig
from octofold.launch.members import least_nodes
from octofold.launch.place import Place, hosts_store, unresolved

READ_TIMEOUT_S = 30.0
RETRY_S = 0.5
CLOSE_TIMEOUT_S = 5
_LEADER = "octofold/leader"
BEATS_MISSED = 3
"""Torch's rendezvous takes a node for dead after so many."""


class MeetingError(UserError):
    """Nodes that do not find each other, or lose each other; to try again may help."""

    status = 1


def connect(place: Place, launch: LaunchConfig) -> TCPStore:
    """The store of the job; the first node makes it, the others wait for it.

    Raises:
        UserError: the port is taken, the name has no address, or nobody listens within the time.
    """
    listens = hosts_store(place)
    timeout_s = launch.rendezvous.timeout_s
    if not listens:
        _wait_for_listener(place, timeout_s)
    elif place.port and (error := _why_taken(place.port)):
        rule = f"the first node listens there: {error}"
        remedy = f"a free port: launch.rendezvous.endpoint={place.host}:PORT, or launch.ports, alike on every node"
        raise ConfigError(place.told_by, f"{place.host}:{place.port}", rule, remedy)
    # The host itself need not reach itself by the name that others use.
    host = "localhost" if listens else place.host
    return TCPStore(
        host,
        place.port,
        is_master=listens,
        multi_tenant=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=READ_TIMEOUT_S),
    )


def _why_taken(port: int) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return "another process holds the port" if taken else str(error.strerror)
    return None


def _wait_for_listener(place: Place, timeout_s: float) -> None:
    """Return once somebody listens at the endpoint: the first node may come later than this one."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            with socket.create_connection((place.host, place.port), timeout=max(RETRY_S, min(left_s, 5.0))):
                return
        except OSError as error:
            last = error
        if left_s < RETRY_S:
            break
        time.sleep(RETRY_S)
    try:
        resolve(place.host, place.port)
    except OSError as error:
        raise unresolved(place, error) from error
    shown, why = f"{place.host}:{place.port}", last.strerror or str(last)
    rule = f"the first node listens there, and for {timeout_s:g} s (launch.rendezvous.timeout_s) nobody answered: {why}"
    remedy = "start the first node; see that no firewall keeps the port"
    raise MeetingError(f"{place.told_by}: {shown}\n  rule:   {rule}\n  remedy: {remedy}")


class Meeting(RendezvousHandler):
    """Torch's rendezvous of all nodes, with ours of how restarts are agreed: through `Exchange`, not by newcomers.

    The agent asks for newcomers ten times a second, over a connection that a cut link would hold for a quarter of an
    hour. A node that comes anew is let in once the one that it replaces is lost, or has failed.
    """

    def __init__(
        self, place: Place, launch: LaunchConfig, store: TCPStore, run_id: str, ports: range | None = None
    ) -> None:
        """
        Args:
            ports: for the ranks' store; None: the system's choice.

        Raises:
            ConfigError: all of them are taken.
        """
        self._place, self._launch = place, launch
        self.hosts_store = hosts_store(place)
        """Whether the store lives in this process."""
        self.address = "localhost" if launch.nodes == 1 else address_towards(place.host, place.port)
        """By which the others reach this node."""
        self.store: Store = store
        self._inner = self._made(store, run_id)
        # With the static rendezvous ranks meet in the job's own store.
        listens = self.hosts_store and launch.rendezvous.backend != "static"
        self._ranks_store = _listening(self.address, ports) if listens else None

    def _made(self, store: TCPStore, run_id: str) -> RendezvousHandler:
        launch, place = self._launch, self._place
        timeout_s = int(launch.rendezvous.timeout_s)
        if launch.rendezvous.backend == "static":
            assert place.node_rank is not None
            host = self.address if place.node_rank == 0 else place.host
            return StaticTCPRendezvous(host, store.port, place.node_rank, launch.nodes, run_id, timeout_s)
        # Torch's own idea of a dead node must come before ours: it would count as one of those that meet again.
        beat_s = max(1, int(launch.rendezvous.lost_after_s / (2 * BEATS_MISSED)))
        last_s = int(launch.rendezvous.last_call_s)
        times = {"join_timeout": timeout_s, "close_timeout": CLOSE_TIMEOUT_S, "keep_alive_interval": beat_s}
        times |= {"last_call_timeout": last_s}
        least, most = least_nodes(launch), launch.nodes
        parameters = RendezvousParameters(
            "c10d", f"{place.host}:{place.port}", run_id, least, most, local_addr=self.address, **times
        )
        return create_handler(store, C10dRendezvousBackend(store, run_id), parameters)

    def next_rendezvous(self) -> RendezvousInfo:
        """Torch's, with the node where all meet as number 0, which leads, and the ranks' store there.

        Torch numbers nodes by their addresses, as texts: one that comes later might get before those that have begun.
        It would keep the ranks' store on its own number 0, so that the job would hang on two nodes.
        """
        with _without_torchs_store():
            info = self._inner.next_rendezvous()
        if self._launch.rendezvous.backend == "static":
            return info
        if self._ranks_store is not None:
            info.store.set(_LEADER, json.dumps([info.rank, self.address, self._ranks_store.port]))
        leader, address, port = json.loads(info.store.get(_LEADER))
        number = 0 if info.rank == leader else info.rank + (info.rank < leader)
        return RendezvousInfo(info.store, number, info.world_size, RendezvousStoreInfo(address, port))

    def get_backend(self) -> str:
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """Ranks listen nowhere: they meet in a store of this process, or of the first node's."""
        return True

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return self._inner.shutdown()


@contextmanager
def _without_torchs_store() -> Iterator[None]:
    """Torch would listen on its own number 0, at a port that the system chooses, for ranks that meet elsewhere."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _listening(address: str, ports: range | None) -> TCPStore:
    """A store at the last of some ports that nobody else holds."""
    limit = timedelta(seconds=READ_TIMEOUT_S)
    for port in reversed(ports or [0]):
        if port and _why_taken(port):
            continue
        try:
            return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=limit)
        except DistNetworkError:
            if not port or not _why_taken(port):
                raise
            # Another took it in between.
    assert ports
    rule = f"ranks meet at one of {ports[0]} to {ports[-1]} of the first node, and other processes hold them all"
    raise ConfigError("launch.ports", f"{ports[0]}-{ports[-1]}", rule, "another range, or end what holds these")


def run_id_of(place: Place, run_dir: Path) -> str:
    """What tells this job from others that meet at the same endpoint."""
    return place.id or str(run_dir)
