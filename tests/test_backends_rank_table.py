"""Rank tables of every version: what is read from them, what is refused and how, and how a run takes its topology."""

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_tables import layers, servers, tables
from run_configs import TINY, tiny_run, write_corpus

from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError, UserError
from octofold.backends.process_group import RankInfo
from octofold.backends.rank_table import parse, read
from octofold.backends.topology import Topology
from octofold.train.build import draft_fitting


def refused(table: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(json.dumps(table), "hccl.json")
    return str(caught.value)


def put(table: Any, path: str, value: Any) -> Any:
    """A copy with another value at a place such as server_list/0/device/1/rank_id; ... takes the key away."""
    changed = copy.deepcopy(table)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place = changed
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(("version", "per_pod"), [("1.0", 2), ("1.2", 4), ("2.0", 4)])
def test_every_version_says_where_ranks_stand(version, per_pod):
    table = parse(json.dumps(tables()[version]), "hccl.json")
    assert (table.version, table.ranks, table.ranks_per_server(), table.ranks_per_super_pod()) == (
        version,
        8,
        2,
        per_pod,
    )
    assert [[device.rank for device in server.devices] for server in table.servers] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert table.servers[1].devices[1].device_id == 1


def test_servers_are_ordered_by_their_ranks():
    table = servers("1.0")
    table["server_list"].reverse()
    assert [server.name for server in parse(json.dumps(table), "t").servers] == [f"node_{i}" for i in range(4)]


def test_one_server_needs_no_addresses_and_one_super_pod_neither():
    for table in (servers("1.0", count=1), servers("1.2", count=2)):
        for server in table["server_list"]:
            for device in server["device"]:
                del device["device_ip"]
        assert len(parse(json.dumps(table), "t").servers) == len(table["server_list"])


D = "server_list/1/device/1"
BROKEN = [
    ("1.0", "version", ..., "hccl.json: ", "has the key version"),
    ("1.0", "version", "1.1", "version = '1.1'", "1.0, 1.2, 2.0"),
    ("1.0", "status", "initializing", "status = 'initializing'", "completed"),
    ("1.0", "server_count", "3", "server_count = '3'", "number of entries of server_list, 4"),
    ("1.0", "server_list", [], "server_list = []", "not empty"),
    ("1.0", "server_list/1", 7, "server_list[1] = 7", "a JSON object"),
    ("1.0", "server_list/1/server_id", "node_0", "server_list[1].server_id", "server_list[0].server_id has it, too"),
    ("1.0", "server_list/1/host_ip", "10.0.0.999", "server_list[1].host_ip", "IPv4 or IPv6"),
    ("1.0", D, {"device_id": "1"}, "server_list[1].device[1] ", "has the key rank_id"),
    ("1.0", f"{D}/device_id", "0", "server_list[1].device[1].device_id", "unique"),
    ("1.0", f"{D}/device_id", "64", "device[1].device_id = '64'", "from 0 to 63"),
    ("1.0", f"{D}/device_ip", "192.168.0.1", "device[1].device_ip", "server_list[0].device[0].device_ip has it"),
    ("1.0", f"{D}/device_ip", ..., "server_list[1].device[1] ", "has device_ip"),
    ("1.0", f"{D}/device_port", "0", "device[1].device_port", "from 1 to 65535"),
    ("1.0", f"{D}/rank_id", "2", "device[1].rank_id", "rank_id is unique"),
    ("1.0", f"{D}/rank_id", "8", "device[1].rank_id = '8'", "ranks are 0 to 7"),
    ("1.0", f"{D}/rank_id", "two", "device[1].rank_id = 'two'", "a whole number"),
    ("1.2", "super_pod_list/1/server_list/0/server_id", "node_9", "super_pod_list[1].server_list[0]", "of server_list"),
    ("1.2", "super_pod_list/1/server_list/0/server_id", "node_0", "super_pod_list[1].server_list[0]", "unique"),
    ("1.2", "super_pod_list/1/super_pod_id", "0", "super_pod_list[1].super_pod_id", "unique"),
    ("1.2", f"{D}/super_device_id", ..., "server_list[1].device[1] ", "npu-smi info -t spod-info"),
    ("1.2", f"{D}/super_device_id", "2", "device[1].super_device_id", "unique"),
    ("2.0", "rank_count", 7, "rank_count = 7", "number of entries of rank_list, 8"),
    ("2.0", "rank_list/3/rank_id", 2, "rank_list[3].rank_id", "unique"),
    ("2.0", "rank_list/3/local_id", 0, "rank_list[3].local_id", "unique"),
    ("2.0", "rank_list/3/level_list/0/net_layer", 1, "level_list[0].net_layer", "begin with 0 and ascend"),
    ("2.0", "rank_list/3/level_list/1/net_layer", 0, "level_list[1].net_layer", "begin with 0 and ascend"),
    ("2.0", "rank_list/3/level_list/0/rank_addr_list/0/addr", "12", "rank_addr_list[0].addr", "32 hexadecimal"),
    ("2.0", "rank_list/3/level_list/1/rank_addr_list/0/addr_type", "MAC", "addr_type = 'MAC'", "EID, IPV4, IPV6"),
    ("2.0", "rank_list/3/level_list/1/net_instance_id", "az7", "rank_list[3]", "one instance of layer 1, az0"),
]


@pytest.mark.parametrize(("version", "path", "value", "place", "rule"), BROKEN)
def test_a_broken_entry_is_named_with_its_rule(version, path, value, place, rule):
    message = refused(put(tables()[version], path, value))
    assert message.startswith("hccl.json: ")
    assert place in message
    assert rule in message.split("rule:")[1]
    assert "remedy:" in message


def test_ranks_and_super_pods_that_cross_are_refused():
    crossed = put(put(servers("1.0"), f"{D}/rank_id", "4"), "server_list/2/device/0/rank_id", "3")
    assert "server node_1 = [2, 4]" in refused(crossed)
    pods = [[0, 2], [1, 3]]
    table = servers("1.2")
    for pod, members in zip(table["super_pod_list"], pods, strict=True):
        pod["server_list"] = [{"server_id": f"node_{number}"} for number in members]
    for server, shift in ((1, 0), (2, 2)):
        for i in range(2):
            table["server_list"][server]["device"][i]["super_device_id"] = str(shift + i)
    assert "servers of a super pod follow one another" in refused(table)


def test_servers_of_two_sizes_are_legal_for_hccl_but_not_for_a_layout():
    table = servers("1.0", count=2)
    last = table["server_list"][1]["device"]
    last.append({"device_id": "2", "device_ip": "192.168.9.9", "rank_id": "4"})
    with pytest.raises(UserError, match=r"server node_0 has 2 rank\(s\), node_1 has 3"):
        parse(json.dumps(table), "t").ranks_per_server()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"version": "1.0", // x', "line 1, column 20"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100000, "rule"),
        (b"[]", "rule"),
    ],
)
def test_a_file_that_is_no_table(content, part, tmp_path):
    path = tmp_path / "hccl.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert part in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"No such file[\s\S]*RANK_TABLE_FILE"):
        read(tmp_path / "none.json")


def places(value: Any, path: str = "") -> list[str]:
    """Every place of a table, as `put` takes it."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in steps for found in (f"{path}{key}", *places(inner, f"{path}{key}/"))]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(version=st.sampled_from(["1.0", "1.2", "2.0"]), value=ANY_JSON, data=st.data())
def test_whatever_stands_in_a_place_it_is_read_or_refused(version, value, data):
    table = tables()[version]
    changed = put(table, data.draw(st.sampled_from(places(table))), value)
    with contextlib.suppress(UserError):
        assert parse(json.dumps(changed), "hccl.json").ranks == 8


@pytest.fixture
def table_file(tmp_path):
    def write(table):
        path = tmp_path / "hccl.json"
        path.write_text(json.dumps(table))
        return path

    return write


def test_a_topology_knows_super_pods_from_the_table(table_file):
    info = RankInfo(rank=5, world_size=8, local_rank=1, local_world_size=2)
    path = table_file(servers("1.2"))
    assert Topology.read(BackendConfig(), info, path) == Topology(2, 4)
    assert Topology.read(BackendConfig(ranks_per_node=4), info, path) == Topology(4, 4), "the configuration goes first"
    assert Topology.read(BackendConfig(), RankInfo(), path) == Topology(1, 1), "one process is no job of the table"
    assert Topology.read(BackendConfig(), info, table_file(layers())) == Topology(2, 4)


@pytest.mark.parametrize(
    ("info", "shown"),
    [
        (RankInfo(1, 4, 1, 2), "WORLD_SIZE=4 RANK_TABLE_FILE="),
        (RankInfo(1, 8, 1, 4), "LOCAL_WORLD_SIZE=4 RANK_TABLE_FILE="),
    ],
)
def test_the_table_of_another_job_is_refused(info, shown, table_file):
    with pytest.raises(ConfigError) as caught:
        Topology.read(BackendConfig(), info, table_file(servers("1.2")))
    assert str(caught.value).startswith(shown)
    assert "unset RANK_TABLE_FILE" in caught.value.remedy


class HcclOnCpu(CpuBackend):
    """Says that its ranks talk through HCCL, whose tables it therefore reads."""

    collective_library = "hccl"


def test_a_run_whose_library_is_hccl_reads_the_table_and_no_other_does(tmp_path, monkeypatch, table_file):
    monkeypatch.setenv("RANK_TABLE_FILE", str(table_file(servers("1.2"))))
    config = tiny_run(write_corpus(tmp_path))
    info = RankInfo(0, 4, 0, 2)
    with pytest.raises(ConfigError, match="RANK_TABLE_FILE"):
        draft_fitting(config, HcclOnCpu(), info, TINY.vocab_size)
    assert Topology.read(config.backend, info) == Topology(2, 2)
