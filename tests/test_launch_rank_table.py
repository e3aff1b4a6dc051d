"""`octofold rank-table`: tables written from a list of servers are those that HCCL reads; mistakes are named."""

import io
import json
import threading

import pytest

from octofold.backends.errors import UserError
from octofold.backends.rank_table import parse
from octofold.launch.cli import main
from octofold.launch.rank_table import wait_until_filled

CONF = "\n".join(f"address_{i}=192.168.2.{i}\nnetmask_{i}=255.255.255.0\nnetdetect_{i}=192.168.2.9" for i in range(2))


@pytest.fixture
def hosts(tmp_path):
    def write(text):
        (tmp_path / "node2.conf").write_text(CONF)
        (tmp_path / "hosts.txt").write_text(text)
        return str(tmp_path / "hosts.txt")

    return write


def test_servers_by_addresses_and_by_hccn_conf(hosts, capsys):
    assert main(["rank-table", hosts("10.0.0.1 192.168.1.0 192.168.1.1  # a comment\n\nnode2 node2.conf\n")]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [server.get("host_ip") for server in table["server_list"]] == ["10.0.0.1", None]
    devices = table["server_list"][1]["device"]
    assert devices[1] == {"device_id": "1", "device_ip": "192.168.2.1", "rank_id": "3"}
    assert (table["version"], parse(json.dumps(table), "t").ranks) == ("1.0", 4)


def test_super_pods(hosts, capsys):
    lines = "".join(f"node{i} 192.168.{i}.1@{i % 2 * 2} 192.168.{i}.2@{i % 2 * 2 + 1}\n" for i in range(4))
    assert main(["rank-table", hosts(lines), "rank_table.servers_per_super_pod=2"]) == 0
    table = parse(capsys.readouterr().out, "t")
    assert (table.version, table.ranks_per_server(), table.ranks_per_super_pod()) == ("1.2", 2, 4)


def test_one_server_from_standard_input_needs_no_addresses(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("localhost\n"))
    assert main(["rank-table", "-", "rank_table.devices=16"]) == 0
    assert parse(capsys.readouterr().out, "t").ranks == 16


def test_a_table_is_checked_and_described(hosts, tmp_path, capsys):
    main(["rank-table", hosts("a 192.168.1.1\nb 192.168.1.2\n")])
    (tmp_path / "table.json").write_text(capsys.readouterr().out)
    assert main(["rank-table", str(tmp_path / "table.json")]) == 0
    assert capsys.readouterr().out == "version 1.0: 2 rank(s) on 2 server(s)\n"


@pytest.mark.parametrize(
    ("text", "arguments", "part"),
    [
        ("a\nb\n", [], "has device_ip"),
        ("a 192.168.1.1\nb 192.168.1.1\n", [], "device_ip is unique"),
        ("a nonsense\n", [], "IPv4 or IPv6"),
        ("# nothing\n", [], "no server"),
        ("a 192.168.1.1\n", ["rank_table.servers_per_super_pod=1"], "npu-smi info -t spod-info"),
        ("a\n", ["rank_table.devices=0"], "1 to 64"),
        ("a\n", ["rank_table.devizes=1"], "rank_table.devices"),
    ],
)
def test_a_list_that_makes_no_table(text, arguments, part, hosts, capsys):
    assert main(["rank-table", hosts(text), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert part in said.err


def test_a_table_that_an_operator_is_filling_is_waited_for(tmp_path, capfd):
    path = tmp_path / "hccl.json"
    path.write_text('{"status": "initializing"}')
    with pytest.raises(UserError, match=r"hccl\.json: status initializing\n.*timeout_s=0\.2\n.*Ascend Operator's log"):
        wait_until_filled({"RANK_TABLE_FILE": str(path)}, 0.2)
    timer = threading.Timer(0.5, path.write_text, ['{"status": "completed"}'])
    timer.start()
    wait_until_filled({"RANK_TABLE_FILE": str(path)}, 20.0)
    assert not timer.is_alive()
    assert f"waiting for {path}" in capfd.readouterr().err


@pytest.mark.parametrize("text", [None, "", "[]", '{"status": "completed"}'])
def test_no_other_table_is_waited_for(text, tmp_path, capfd):
    path = tmp_path / "hccl.json"
    if text is not None:
        path.write_text(text)
    wait_until_filled({"RANK_TABLE_FILE": str(path)}, 600.0)
    wait_until_filled({}, 600.0)
    assert capfd.readouterr().err == "", "it would say that it waits"
