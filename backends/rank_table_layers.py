"""Rank tables of version 2.0 (Ascend 950): a list of ranks, each with its network layers. Torch-free.

Layer 0 is what a server's devices reach by the driver's topology file, layer 1 the plane between servers; what lies
above is the network between such planes. So an instance of layer 0 counts as a server, one of layer 1 as a super pod.
"""

from octofold.backends.rank_table_entries import Device, Entry, Once, Server, require_whole
from octofold.backends.rank_table_servers import MOST_PORT

MOST_RANKS = 65536
MOST_LOCAL = 64
MOST_LAYERS = 8
MOST_ADDRESSES = 24
ADDRESS_TYPES = ("EID", "IPV4", "IPV6")
HEX_DIGITS_OF_EID = 32


def servers_of_layers(table: Entry) -> list[Server]:
    """The servers in the order of their ranks.

    Raises:
        UserError: naming the first entry that breaks a rule.
    """
    entries = table.each("rank_list")
    count = table.get("rank_count")
    if count.number(1, MOST_RANKS) != len(entries):
        raise count.error(f"the number of entries of rank_list, {len(entries)}")
    once = Once("rank_id")
    for entry in entries:
        once.add(entry.get("rank_id"), entry.get("rank_id").number(0, MOST_RANKS - 1))
    ranks = [entry.get("rank_id") for entry in entries]
    require_whole(ranks, [rank.number(0, MOST_RANKS) for rank in ranks])
    servers: dict[str, list[Device]] = {}
    pods: dict[str, str | None] = {}
    local_ids: dict[str, Once] = {}
    for entry in sorted(entries, key=lambda entry: entry.get("rank_id").number(0, MOST_RANKS)):
        instances, address = _layers(entry)
        server, pod = instances[0], instances.get(1)
        if servers and server in servers and server != next(reversed(servers)):
            raise entry.get("rank_id").error(
                f"the ranks of {server}, its net_instance_id of layer 0, follow one another"
            )
        if pods.setdefault(server, pod) != pod:
            raise entry.error(f"ranks of {server} are all in one instance of layer 1, {pods[server]}")
        local = entry.get("local_id")
        local_ids.setdefault(server, Once(f"local_id in {server}")).add(local, local.number(0, MOST_LOCAL))
        rank, device_id = entry.get("rank_id").number(0, MOST_RANKS), entry.get("device_id").number(0, MOST_LOCAL)
        servers.setdefault(server, []).append(Device(rank, device_id, address))
    return [Server(name, tuple(devices), pods[name]) for name, devices in servers.items()]


def _layers(rank: Entry) -> tuple[dict[int, str], str | None]:
    """Layer -> instance, and the first address of layer 0."""
    for key in ("device_port", "host_port"):
        if port := rank.find(key):
            port.number(1, MOST_PORT)
    layers = rank.each("level_list")
    if len(layers) > MOST_LAYERS:
        raise rank.get("level_list").error(f"at most {MOST_LAYERS} layers")
    instances: dict[int, str] = {}
    first: str | None = None
    for layer in layers:
        number = layer.get("net_layer").number(0, MOST_LAYERS - 1)
        if number <= max(instances, default=-1) or (not instances and number):
            raise layer.get("net_layer").error("layers begin with 0 and ascend")
        instances[number] = layer.get("net_instance_id").text(1024)
        kinds = ["TOPO_FILE_DESC", "CLOS"]
        if layer.get("net_type").value not in kinds:
            raise layer.get("net_type").error(" or ".join(kinds))
        addresses = [_address(address) for address in layer.each("rank_addr_list")]
        if len(addresses) > MOST_ADDRESSES:
            raise layer.get("rank_addr_list").error(f"at most {MOST_ADDRESSES} addresses")
        first = first or addresses[0]
    return instances, first


def _address(entry: Entry) -> str:
    kind, address = entry.get("addr_type"), entry.get("addr")
    if str(kind.value).upper() not in ADDRESS_TYPES:
        raise kind.error(f"one of {', '.join(ADDRESS_TYPES)}")
    entry.each("ports")
    if str(kind.value).upper() != "EID":
        return address.address()
    text = address.text(256)
    if len(text) != HEX_DIGITS_OF_EID or not all(digit in "0123456789abcdefABCDEF" for digit in text):
        raise address.error(f"an EID, {HEX_DIGITS_OF_EID} hexadecimal digits, as hccn_tool tells")
    return text
