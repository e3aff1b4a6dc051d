"""Rank tables of versions 1.0 and 1.2: a list of servers, and of the super pods that they form. Torch-free."""

from octofold.backends.rank_table_entries import Device, Entry, Once, Server, require_whole

MOST_PORT = 65535
MOST_DEVICES = 64
MOST_RANKS = 1 << 20
PORTS = ("device_port", "backup_device_port", "host_port")
SUPER_DEVICE = "super_device_id is the SDID that `npu-smi info -t spod-info -i ID -c CHIP` tells"


def servers_of_list(table: Entry, version: str) -> list[Server]:
    """The servers in the order of their ranks.

    Raises:
        UserError: naming the first entry that breaks a rule.
    """
    entries = table.each("server_list")
    count = table.find("server_count") if version == "1.2" else table.get("server_count")
    if count and count.number(1, MOST_RANKS) != len(entries):
        raise count.error(f"the number of entries of server_list, {len(entries)}")
    pods = _super_pods(table, entries) if version == "1.2" else {}
    names, addresses, ranks = Once("server_id"), Once("device_ip"), Once("rank_id")
    servers: list[Server] = []
    rank_entries: list[Entry] = []
    needs_address = len(entries) > 1 if not pods else len(set(pods.values())) > 1
    for entry in entries:
        name = entry.get("server_id").text(64)
        names.add(entry.get("server_id"), name)
        if host := entry.find("host_ip"):
            host.address()
        ids = Once(f"device_id on server {name}")
        devices: list[Device] = []
        for device in entry.each("device"):
            devices.append(_device(device, ids, addresses, ranks, needs_address=needs_address))
            rank_entries.append(device.get("rank_id"))
        servers.append(Server(name, tuple(sorted(devices, key=lambda device: device.rank)), pods.get(name)))
    require_whole(rank_entries, [entry.number(0, MOST_RANKS) for entry in rank_entries])
    if pods:
        _require_super_devices(entries, pods)
    return _in_order(table, servers)


def _device(entry: Entry, ids: Once, addresses: Once, ranks: Once, *, needs_address: bool) -> Device:
    device_id, rank = entry.get("device_id"), entry.get("rank_id")
    number = device_id.number(0, MOST_DEVICES - 1)
    ids.add(device_id, number)
    ranks.add(rank, rank.number(0, MOST_RANKS))
    for key in PORTS:
        if port := entry.find(key):
            port.number(1, MOST_PORT)
    address = entry.find("device_ip")
    if address is None or address.value == "":
        if needs_address:
            rule = "has device_ip, without which devices of several servers, or super pods, do not meet"
            raise entry.error(rule, f"add address_{number} of the server's /etc/hccn.conf")
        return Device(rank.number(0, MOST_RANKS), number)
    addresses.add(address, address.address())
    return Device(rank.number(0, MOST_RANKS), number, address.address())


def _super_pods(table: Entry, servers: list[Entry]) -> dict[str, str]:
    """Server -> super pod; empty where the table lists none, which HCCL takes for plain servers."""
    if table.find("super_pod_list") is None:
        return {}
    known = {server.get("server_id").text(64) for server in servers}
    pods, once = Once("super_pod_id"), Once("a server's super pod")
    found: dict[str, str] = {}
    for pod in table.each("super_pod_list"):
        name = str(pod.get("super_pod_id").value)
        pods.add(pod.get("super_pod_id"), name)
        for member in pod.each("server_list"):
            server = member.get("server_id")
            if server.text(64) not in known:
                raise server.error("one of the servers of server_list")
            once.add(server, server.text(64))
            found[server.text(64)] = name
    for server in servers:
        if server.get("server_id").text(64) not in found:
            raise server.get("server_id").error("every server belongs to a super pod of super_pod_list")
    return found


def _require_super_devices(servers: list[Entry], pods: dict[str, str]) -> None:
    once = {pod: Once(f"super_device_id in super pod {pod}") for pod in pods.values()}
    for server in servers:
        for device in server.each("device"):
            super_device = device.find("super_device_id")
            if super_device is None:
                raise device.error(f"in a super pod it has super_device_id; {SUPER_DEVICE}")
            once[pods[server.get("server_id").value]].add(super_device, super_device.number(0, (1 << 32) - 1))


def _in_order(table: Entry, servers: list[Server]) -> list[Server]:
    """By rank; ranks of servers, and servers of super pods, do not cross."""
    servers = sorted(servers, key=lambda server: server.devices[0].rank)
    expected = 0
    left: set[str | None] = set()
    for before, server in zip([None, *servers], servers, strict=False):
        for device in server.devices:
            if device.rank != expected:
                rule = "the ranks of a server follow one another"
                raise Entry(f"{table.place}server {server.name}", [d.rank for d in server.devices]).error(rule)
            expected += 1
        if before and before.super_pod != server.super_pod:
            left.add(before.super_pod)
        if server.super_pod in left:
            rule = "the servers of a super pod follow one another"
            raise Entry(f"{table.place}server {server.name}", f"super pod {server.super_pod}").error(rule)
    return servers
