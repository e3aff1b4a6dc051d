"""Writes HCCL rank tables of versions 1.0 and 1.2 from a list of servers. Torch-free.

Version 2.0 is not written: its EIDs and ports of each die come from the driver's topology file and from hccn_tool.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.backends.rank_table import parse

ADDRESS_LINE = re.compile(r"^address_(\d+)=(\S+)\s*$", re.MULTILINE)
"""Of /etc/hccn.conf: number of the device, address of its network card."""
LISTED = "SERVER [DEVICE_IP[@SUPER_DEVICE_ID] ...] or SERVER HCCN_CONF"


@dataclass(frozen=True)
class Host:
    """A server to be listed."""

    name: str
    """Unique; an IPv4 address also becomes host_ip."""
    devices: tuple[tuple[str, str], ...]
    """Address and super_device_id of each device in the order of their ids, empty where there is none."""


def hosts_of(text: str, folder: Path, devices: int) -> list[Host]:
    """The servers that lines such as `LISTED` say; # begins a comment.

    Args:
        folder: where the names of copies of hccn.conf are looked for.
        devices: of a server whose line names none.

    Raises:
        UserError: with the line.
    """
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *said = words
        if len(said) == 1 and (folder / said[0]).is_file():
            pairs = _of_hccn_conf(folder / said[0])
        else:
            pairs = [(address, super_id) for address, _, super_id in (word.partition("@") for word in said)]
        hosts.append(Host(name, tuple(pairs) or (("", ""),) * devices))
        if not hosts[-1].devices:
            raise UserError(f"line {number}: {line}\n  rule:   a server has devices\n  remedy: {LISTED}")
    if not hosts:
        raise UserError(f"no server\n  rule:   a line a server: {LISTED}\n  remedy: octofold rank-table --help")
    return hosts


def _of_hccn_conf(path: Path) -> list[tuple[str, str]]:
    addresses = {int(number): address for number, address in ADDRESS_LINE.findall(path.read_text(encoding="utf-8"))}
    if sorted(addresses) != list(range(len(addresses))) or not addresses:
        rule = f"lines address_0=… to address_N=…, none left out; found {sorted(addresses)}"
        raise UserError(f"{path}\n  rule:   {rule}\n  remedy: a copy of the server's /etc/hccn.conf, or the addresses")
    return [(addresses[number], "") for number in sorted(addresses)]


def table_of(hosts: list[Host], servers_per_super_pod: int = 0) -> str:
    """The JSON text of a checked table, whose ranks are numbered in the order given.

    Args:
        servers_per_super_pod: 0: version 1.0, no super pods.

    Raises:
        UserError: what HCCL would refuse, with the entry.
    """
    rank = 0
    servers = []
    for host in hosts:
        devices = []
        for device_id, (address, super_id) in enumerate(host.devices):
            said = {"device_ip": address, "super_device_id": super_id}
            device = {"device_id": str(device_id), **{key: value for key, value in said.items() if value}}
            devices.append({**device, "rank_id": str(rank)})
            rank += 1
        is_ip = re.fullmatch(r"\d+(\.\d+){3}", host.name)
        servers.append({"server_id": host.name, **({"host_ip": host.name} if is_ip else {}), "device": devices})
    table: dict[str, object] = {
        "version": "1.2" if servers_per_super_pod else "1.0",
        "status": "completed",
        "server_count": str(len(servers)),
        "server_list": servers,
    }
    if servers_per_super_pod:
        names = [{"server_id": host.name} for host in hosts]
        starts = range(0, len(names), servers_per_super_pod)
        pods = [names[start : start + servers_per_super_pod] for start in starts]
        table["super_pod_list"] = [{"super_pod_id": str(i), "server_list": pod} for i, pod in enumerate(pods)]
    text = json.dumps(table, indent=2) + "\n"
    parse(text, "the table")
    return text
