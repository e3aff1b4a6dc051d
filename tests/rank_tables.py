"""Rank tables of every version, as Huawei's documentation shows them, for tests to break."""

from typing import Any


def servers(version: str, count: int = 4, devices: int = 2) -> dict[str, Any]:
    """Version 1.0 or 1.2; in 1.2 two servers make a super pod."""
    listed = []
    for server in range(count):
        device = [
            {"device_id": str(i), "device_ip": f"192.168.{server}.{i + 1}", "rank_id": str(server * devices + i)}
            for i in range(devices)
        ]
        if version == "1.2":
            device = [{**d, "super_device_id": str(server % 2 * devices + i)} for i, d in enumerate(device)]
        listed.append({"server_id": f"node_{server}", "host_ip": f"172.16.0.{server + 1}", "device": device})
    table = {"status": "completed", "version": version, "server_count": str(count), "server_list": listed}
    if version == "1.2":
        pods = [[f"node_{2 * pod}", f"node_{2 * pod + 1}"] for pod in range(count // 2)]
        table["super_pod_list"] = [
            {"super_pod_id": str(pod), "server_list": [{"server_id": name} for name in names]}
            for pod, names in enumerate(pods)
        ]
    return table


def layers(count: int = 4, devices: int = 2) -> dict[str, Any]:
    """Version 2.0: two servers share an instance of layer 1."""

    def level(layer: int, instance: str, kind: str, address: dict[str, Any]) -> dict[str, Any]:
        return {"net_layer": layer, "net_instance_id": instance, "net_type": kind, "rank_addr_list": [address]}

    ranks = []
    for rank in range(count * devices):
        server = rank // devices
        eid = {"addr_type": "EID", "addr": f"{rank:032x}", "ports": ["0/4"], "plane_id": "plane0"}
        ipv4 = {"addr_type": "IPV4", "addr": f"172.16.{server}.{rank + 1}", "ports": ["d2h"]}
        inner = level(0, f"az0-rack0-pod{server}", "TOPO_FILE_DESC", eid)
        outer = level(1, f"az{server // 2}", "CLOS", ipv4)
        local = rank % devices
        ranks.append({"rank_id": rank, "local_id": local, "device_id": local, "level_list": [inner, outer]})
    return {"status": "completed", "version": "2.0", "rank_count": len(ranks), "rank_list": ranks}


def tables() -> dict[str, dict[str, Any]]:
    """Version -> a table of 4 servers of 2 devices."""
    return {"1.0": servers("1.0"), "1.2": servers("1.2"), "2.0": layers()}
