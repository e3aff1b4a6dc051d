"""`octofold doctor`: interfaces, addresses and ports that the communication libraries are told to use."""

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from octofold.launch.doctor_finding import FAIL, WARN, Check, Finding, Problem, Surroundings, ok
from octofold.launch.doctor_matrix import HCCL_BASE_PORT, HCCL_PORTS

PATTERNS = ("HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Prefixes of names; =eth0 means the whole name, ^ all but these."""
NAMES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
RESOLVE_LIMIT_S = 3.0
SYSCTL = Path("/proc/sys/net/ipv4")

NO_INTERFACE = Problem(
    FAIL,
    "{variable}={value} matches no interface of this machine ({known})",
    "set {variable} to one of these, or unset it",
)


def check_interfaces(here: Surroundings) -> Iterator[Finding]:
    known = [name for _, name in socket.if_nameindex()]
    said = {name: here.environ[name] for name in (*PATTERNS, *NAMES) if here.environ.get(name)}
    for variable, value in said.items():
        chosen = (
            matching(value, known) if variable in PATTERNS else [name for name in value.split(",") if name in known]
        )
        lacking = variable in NAMES and len(chosen) < len(value.split(","))
        if lacking or not chosen:
            yield NO_INTERFACE.found(variable=variable, value=value, known=", ".join(known))
        else:
            yield ok(f"{variable}={value}: {', '.join(chosen)}")
    if not said:
        yield ok(f"{', '.join(known)}; none is named in the environment")


def matching(value: str, known: list[str]) -> list[str]:
    """The interfaces that a value such as eth, =eth0, ^docker or ^=lo,docker0 leaves."""
    excludes = value.startswith("^")
    value = value.removeprefix("^")
    whole = value.startswith("=")
    names = value.removeprefix("=").split(",")
    return [
        name
        for name in known
        if excludes != any(name == said if whole else name.startswith(said) for said in names if said)
    ]


UNRESOLVED = Problem(
    FAIL, "MASTER_ADDR={host} is not resolved: {error}", "set MASTER_ADDR to an address, or mend DNS or /etc/hosts"
)
TAKEN = Problem(FAIL, "MASTER_PORT={port} cannot be listened on: {error}", "choose a free port, the same on every rank")
NOT_OURS = Problem(
    FAIL, "HCCL_IF_IP={address} is no address of this machine: {error}", "set it to this machine's, or unset it"
)
UNRESERVED = Problem(
    WARN,
    "HCCL takes ports {first} to {last}, which the system may give to others",
    "sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}",
)


def check_ports(here: Surroundings) -> Iterator[Finding]:
    host, port = here.environ.get("MASTER_ADDR"), here.environ.get("MASTER_PORT", "")
    found = list(_address_problems(here))
    if host and (error := _resolve(host)):
        found.append(UNRESOLVED.found(host=host, error=error))
    # torchrun's agent listens itself.
    listens = here.environ.get("RANK") == "0" and "TORCHELASTIC_RUN_ID" not in here.environ
    if listens and port.isdigit() and (error := _bind("", int(port))):
        found.append(TAKEN.found(port=port, error=error))
    base = here.environ.get("HCCL_IF_BASE_PORT", "")
    if here.ascend and "RANK_TABLE_FILE" not in here.environ:
        first = int(base) if base.isdigit() else HCCL_BASE_PORT
        last = first + HCCL_PORTS - 1
        if not _reserved(first, last):
            found.append(UNRESERVED.found(first=first, last=last))
    yield from found or [ok(f"rank 0 at {host}:{port}" if host else "no address or port is set")]


def _address_problems(here: Surroundings) -> Iterator[Finding]:
    address = here.environ.get("HCCL_IF_IP")
    if address and (error := _bind(address, 0)):
        yield NOT_OURS.found(address=address, error=error)


def _bind(address: str, port: int) -> str | None:
    """Why one cannot listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((address, port))
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def _resolve(host: str) -> str | None:
    """Why a name has no address; a name server that does not answer is not waited for."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(host, None)
            answers.append(None)
        except (OSError, UnicodeError) as error:
            answers.append(str(error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_LIMIT_S)
    return answers[0] if answers else f"no answer within {RESOLVE_LIMIT_S:g} s"


def _reserved(first: int, last: int) -> bool:
    """Whether the system keeps the ports out of those that it gives to clients."""
    low, high = map(int, (SYSCTL / "ip_local_port_range").read_text().split())
    if last < low or first > high:
        return True
    reserved: set[int] = set()
    for part in (SYSCTL / "ip_local_reserved_ports").read_text().strip().split(","):
        start, _, end = part.partition("-")
        if start:
            reserved.update(range(int(start), int(end or start) + 1))
    return set(range(first, last + 1)) <= reserved


CHECKS = (
    Check(
        "interfaces",
        "that HCCL_, NCCL_, GLOO_ and TP_SOCKET_IFNAME name interfaces of this machine",
        check_interfaces,
        (NO_INTERFACE,),
    ),
    Check(
        "ports",
        "MASTER_ADDR, MASTER_PORT (on rank 0), HCCL_IF_IP and the ports of HCCL",
        check_ports,
        (UNRESOLVED, TAKEN, NOT_OURS, UNRESERVED),
    ),
)
