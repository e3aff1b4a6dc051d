"""`octofold doctor` on a job's environment (ranks, tables, variables, interfaces, ports) and on the machine."""

import json
import socket
import time

import pytest
from rank_tables import servers

from octofold.launch import doctor_machine, doctor_network
from octofold.launch.doctor import CHECKS
from octofold.launch.doctor_finding import Surroundings
from octofold.launch.doctor_network import matching
from octofold.launch.doctor_probe import TorchFacts

JOB = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
JOB["MASTER_PORT"] = "29500"


@pytest.fixture
def said_by(tmp_path):
    """(status, what, remedy) of each finding of a check."""

    def findings(check, environ=None, said=None, ascend=False, run_dir=None):
        here = Surroundings(environ or {}, run_dir or tmp_path, TorchFacts(said or {}), ascend)
        (named,) = [one for one in CHECKS if one.name == check]
        return [(finding.status, finding.what, finding.remedy) for finding in named.findings(here)]

    return findings


@pytest.mark.parametrize(
    ("changed", "status", "part"),
    [
        ({}, "ok", "rank 1 of 8"),
        ({"RANK": "8"}, "fail", "RANK=8 WORLD_SIZE=8; rule: ranks are 0 to WORLD_SIZE - 1"),
        ({"WORLD_SIZE": "many"}, "fail", "WORLD_SIZE=many; rule: a whole number"),
        ({"MASTER_ADDR": None}, "fail", "MASTER_ADDR not set"),
        ({"LOCAL_WORLD_SIZE": "16"}, "fail", "LOCAL_WORLD_SIZE=16, and torch sees 8 device(s)"),
        ({"RANK": None}, "ok", "no launcher"),
    ],
)
def test_ranks(changed, status, part, said_by):
    environ = {name: value for name, value in {**JOB, **changed}.items() if value is not None}
    ((found, what, remedy),) = said_by("ranks", environ, {"cuda": {"devices": ["H100"] * 8}})
    assert (found, part in what) == (status, True)
    assert bool(remedy) == (status == "fail")


def test_slurms_variables_that_make_no_sense_are_survived(said_by):
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4", "SLURM_NODEID": "3"}
    ((status, what, _),) = said_by("ranks", environ)
    assert (status, "could not be checked" in what) == ("warn", True)


@pytest.mark.parametrize(
    ("text", "status", "part"),
    [
        (json.dumps(servers("1.2")), "ok", "version 1.2: 8 rank(s) on 4 server(s) in 2 super pod(s)"),
        (json.dumps(servers("1.0", count=2)), "fail", "lists 4 ranks, and WORLD_SIZE=8"),
        ("{not json", "fail", "line 1, column 2; rule: JSON"),
        (
            json.dumps({**servers("1.0"), "server_count": "9"}),
            "fail",
            "server_count = '9'; rule: the number",
        ),
    ],
)
def test_rank_tables(text, status, part, said_by, tmp_path):
    path = tmp_path / "hccl.json"
    path.write_text(text)
    ((found, what, _),) = said_by("rank table", {**JOB, "RANK_TABLE_FILE": str(path)})
    assert (found, part in what) == (status, True), what


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HCCL_CONNECT_TIMEOUT", "600", "ok"),
        ("HCCL_CONNECT_TIMEOUT", "60", "fail"),
        ("HCCL_BUFFSIZE", "200MB", "fail"),
        ("HCCL_DETERMINISTIC", "TRUE", "ok"),
        ("HCCL_DETERMINISTIC", "yes", "fail"),
        ("HCCL_BUFSIZE", "200", "warn"),
        ("HCCL_WHITELIST_DISABLE", "0", "fail"),
    ],
)
def test_variables_of_hccl(name, value, expected, said_by):
    ((status, what, remedy),) = said_by("hccl", {name: value})
    assert status == expected
    assert f"{name}={value}" in what or expected == "warn"
    if name == "HCCL_BUFSIZE":
        assert "HCCL_BUFFSIZE" in remedy


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("HCCL_SOCKET_IFNAME", "=lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "l", "ok"),
        ("NCCL_SOCKET_IFNAME", "=l", "fail"),
        ("HCCL_SOCKET_IFNAME", "enp66s0f5", "fail"),
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "l", "fail"),
        ("TP_SOCKET_IFNAME", "lo,nonesuch", "fail"),
    ],
)
def test_interfaces_that_this_machine_has_not(variable, value, status, said_by):
    ((found, what, remedy),) = said_by("interfaces", {variable: value})
    assert found == status
    assert f"{variable}={value}" in what
    if status == "fail":
        assert "lo" in what
        assert variable in remedy


def test_patterns_of_interfaces():
    known = ["lo", "docker0", "eth0", "eth10"]
    assert matching("eth,docker", known) == ["docker0", "eth0", "eth10"]
    assert matching("=eth0,lo", known) == ["lo", "eth0"]
    assert matching("^docker,lo", known) == ["eth0", "eth10"]
    assert matching("^=eth0", known) == ["lo", "docker0", "eth10"]


def test_ports_and_addresses(said_by, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {**JOB, "RANK": "0", "MASTER_PORT": port}
        assert said_by("ports", environ)[0][1].startswith(f"MASTER_PORT={port} cannot be listened on")
        agent = {**environ, "TORCHELASTIC_RUN_ID": "1"}
        assert said_by("ports", agent)[0][0] == "ok", "torchrun's agent listens there itself"
    assert said_by("ports", environ)[0][:2] == ("ok", f"rank 0 at 127.0.0.1:{port}")
    (found,) = said_by("ports", {**JOB, "HCCL_IF_IP": "192.0.2.1"})
    assert found[1].startswith("HCCL_IF_IP=192.0.2.1 is no address of this machine")
    (found,) = said_by("ports", {**JOB, "MASTER_ADDR": "no.such.host.invalid"})
    assert found[1].startswith("MASTER_ADDR=no.such.host.invalid is not resolved")


@pytest.mark.parametrize(("kept", "count"), [("", 1), ("60000-60030", 1), ("22,60000-60031", 0)])
def test_ports_that_the_system_may_give_away(kept, count, said_by, tmp_path, monkeypatch):
    (tmp_path / "ip_local_port_range").write_text("32768\t60999\n")
    (tmp_path / "ip_local_reserved_ports").write_text(f"{kept}\n")
    monkeypatch.setattr(doctor_network, "SYSCTL", tmp_path)
    found = [remedy for status, _, remedy in said_by("ports", ascend=True) if status == "warn"]
    assert found == ["sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031"] * count


def test_memory_disk_and_shared_memory(said_by, tmp_path, monkeypatch):
    usage = doctor_machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    assert [found[0] for found in said_by("memory")][1] == "warn"
    assert "--shm-size" in said_by("memory")[1][2]
    assert said_by("disk", run_dir=tmp_path / "not/yet/there")[0][:2] == (
        "fail",
        f"0.1 GiB free in {tmp_path}, less than 1 GiB",
    )
    monkeypatch.setattr(doctor_machine, "usable_memory_bytes", lambda: 2 << 30)
    assert said_by("memory")[0][:2] == ("warn", "2.0 GiB of memory may be used")


def test_a_folder_that_may_not_be_written(said_by, tmp_path, monkeypatch):
    # Root, as whom tests may run, writes everywhere.
    monkeypatch.setattr(doctor_machine.os, "access", lambda path, mode: False)
    assert said_by("disk")[0][:2] == ("fail", f"{tmp_path} may not be written")
    assert said_by("clock")[0][0] == "ok"


def test_a_clock_that_differs_from_the_disks(said_by, monkeypatch):
    assert said_by("clock")[0][0] == "ok"
    monkeypatch.setattr(doctor_machine.time, "time", lambda now=time.time: now() - 60)
    (skewed, *_) = said_by("clock")
    assert (skewed[0], "a time 60 s from" in skewed[1]) == ("warn", True)


def test_more_threads_than_cores(said_by):
    found = said_by("cpu", {"OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "8"})
    assert found[0][0] == "warn"
    assert found[1][0] == "ok"
