"""Nodes on one Linux machine: network namespaces joined by a bridge, with links of a given rate. Needs root.

The ranks of a node share a namespace. They talk to each other over its loopback device, shaped to the fast rate, and to
other nodes over one virtual Ethernet link, shaped both ways to the slow rate by the kernel's token-bucket filter.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BRIDGE = "octobench"
LINK = "slow0"
"""The name of a node's Ethernet device inside its namespace."""


@dataclass(frozen=True)
class Node:
    """A namespace and its address."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command inside the node."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def sent_bytes(self) -> int:
        """Bytes that have left the node over the slow link, headers included."""
        path = f"/sys/class/net/{LINK}/statistics/tx_bytes"
        return int(subprocess.run(self.command("cat", path), check=True, capture_output=True, text=True).stdout)


def require_root() -> None:
    """End the program with a message where namespaces cannot be made."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        sys.exit("this benchmark makes network namespaces: run it as root (sudo)")
    if missing:
        sys.exit(f"this benchmark needs {' and '.join(missing)} (package iproute2)")


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


@contextmanager
def emulated(nodes: int, *, slow_mbit: int, fast_mbit: int) -> Iterator[list[Node]]:
    """Nodes, until the block ends."""
    made = [Node(f"{BRIDGE}{number}", f"10.201.77.{number + 1}") for number in range(nodes)]
    _remove(made)  # what a killed run left
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "up")
        for node in made:
            _connect(node, slow_mbit, fast_mbit)
        yield made
    finally:
        _remove(made)


def _connect(node: Node, slow_mbit: int, fast_mbit: int) -> None:
    outside = f"{node.name}o"
    _run("ip", "netns", "add", node.name)
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", LINK, "netns", node.name)
    _run("ip", "link", "set", outside, "master", BRIDGE, "up")
    _run(*node.command("ip", "address", "add", f"{node.address}/24", "dev", LINK))
    for device in ("lo", LINK):
        _run(*node.command("ip", "link", "set", "dev", device, "up"))
    # Out of the node, into it, and inside it.
    _run(*node.command("tc", "qdisc", "add", "dev", LINK, *_rate(slow_mbit)))
    _run("tc", "qdisc", "add", "dev", outside, *_rate(slow_mbit))
    _run(*node.command("tc", "qdisc", "add", "dev", "lo", *_rate(fast_mbit)))


def _rate(mbit: int) -> list[str]:
    # The bucket holds the largest packet that TCP hands down.
    return ["root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "1s"]


def _remove(nodes: list[Node]) -> None:
    for node in nodes:
        subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", f"{node.name}o"], check=False, capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)
