"""This machine's addresses and interfaces, and those by which it reaches another. Torch-free."""

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915
IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def interface_addresses() -> dict[str, list[str]]:
    """Interface -> its addresses, IPv4 first; loopback included, IPv6 link-local not."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for name in found:
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name].append(socket.inet_ntoa(answer[20:24]))
    lines = IPV6_ADDRESSES.read_text().splitlines() if IPV6_ADDRESSES.exists() else []
    for line in lines:
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            found.setdefault(name, []).append(str(address))
    return found


def resolve(host: str, port: int = 0) -> list[str]:
    """The addresses of a name, or of an address itself.

    Raises:
        OSError: it has none.
    """
    try:
        return list(
            dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        )
    except UnicodeError as error:
        raise OSError(str(error)) from error


def is_local(address: str) -> bool:
    """Whether one can listen on an address here."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        try:
            tried.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(host: str, port: int) -> str:
    """The address of this machine that others of a job reach it by: that from which it reaches `host`.

    Of the host itself, whose own name often means loopback (/etc/hosts), the first that is not. Nothing is sent.

    Raises:
        OSError: the name has no address, or there is no way to it.
    """
    target = resolve(host, port)[0]
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as tried:
        tried.connect((target, port))
        mine = str(tried.getsockname()[0])
    if not ipaddress.ip_address(mine).is_loopback:
        return mine
    others = [address for addresses in interface_addresses().values() for address in addresses]
    return next((address for address in others if not ipaddress.ip_address(address).is_loopback), mine)


def interface_of(address: str) -> str | None:
    """The interface that has an address."""
    return next((name for name, addresses in interface_addresses().items() if address in addresses), None)
