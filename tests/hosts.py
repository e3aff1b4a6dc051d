"""Hosts as network namespaces of one machine, joined by a bridge: root on Linux with iproute2.

Each has a name, an address and an /etc/hosts of its own. Their processes share the disk, as nodes of a cluster do.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WHY_NOT = next(
    (
        why
        for why, lacks in {
            "network namespaces need root": os.geteuid() != 0,
            "ip and tc (iproute2) are not installed": None in (shutil.which("ip"), shutil.which("tc")),
            "unshare and nsenter (util-linux) are not installed": shutil.which("nsenter") is None,
        }.items()
        if lacks
    ),
    "",
)
"""Why there can be no hosts here; empty where there can."""
NETWORK = "10.213.7"
TRAIN = [sys.executable, "-m", "octofold.launch.cli", "train"]


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    space: str
    """Of the network."""
    holder: subprocess.Popen[bytes]
    """The process that keeps its other namespaces."""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[str]:
        """Run a command there, in a session of its own, its output in a file."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PET_", "MASTER_"))}
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.space}", "--uts", "--mount", "-t", str(self.holder.pid), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                cwd=os.getcwd(),
                env=environment | variables,
            )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """What the loss of power does to its processes."""
        for process in self.started:
            family = [psutil.Process(process.pid)] if process.poll() is None else []
            for member in family[:]:
                with suppress(psutil.NoSuchProcess):
                    family += member.children(recursive=True)
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def cut(self) -> None:
        """Take its link away: what is sent is lost, and nobody is told."""
        _ip("link", "set", _outer(self.space), "nomaster")

    def slow(self, rate: str) -> None:
        """Let no more than this through to it, such as 20mbit."""
        shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", _outer(self.space), "root", *shape], check=True)


def _outer(space: str) -> str:
    return space.replace("-", "v")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts node0, node1 … that reach each other by name, and nothing else.

    Args:
        folder: for their /etc/hosts.
    """
    stem = f"of{os.getpid() % 100000}"
    made: list[Host] = []
    bridge = f"{stem}b"
    names = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{n + 1} node{n}" for n in range(count))]
    names.write_text("\n".join(lines) + "\n")
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        made.extend(_made(f"{stem}-{n}", n, bridge, names) for n in range(count))
        yield made
    finally:
        for host in made:
            host.kill()
            host.holder.kill()
            host.holder.wait()
        for n in range(count):
            # A space lives on as long as a process in it, and its link with it.
            subprocess.run(["ip", "link", "del", _outer(f"{stem}-{n}")], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", f"{stem}-{n}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def _made(space: str, n: int, bridge: str, names: Path) -> Host:
    _ip("netns", "add", space)
    inner, outer = f"{_outer(space)}i", _outer(space)
    _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
    _ip("link", "set", inner, "netns", space)
    _ip("link", "set", outer, "master", bridge, "up")
    _ip("-n", space, "addr", "add", f"{NETWORK}.{n + 1}/24", "dev", inner)
    _ip("-n", space, "link", "set", inner, "up")
    _ip("-n", space, "link", "set", "lo", "up")
    # Names of its own: a mount namespace with another /etc/hosts, and another host name.
    script = f"hostname node{n} && mount --bind {names} /etc/hosts && echo ready && exec sleep 3600"
    holder = subprocess.Popen(
        ["unshare", "--mount", "--uts", "sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    return Host(f"node{n}", f"{NETWORK}.{n + 1}", space, holder)


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[int]:
    """Their exit statuses, once all have ended.

    Raises:
        subprocess.TimeoutExpired: one takes longer.
    """
    deadline_s = time.monotonic() + seconds
    return [process.wait(max(0.1, deadline_s - time.monotonic())) for process in processes]
