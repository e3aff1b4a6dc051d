"""`launch.ports`: what is such a range, who gets which of its ports, and that what is taken is passed by."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.cli import main
from octofold.launch.compose import compose
from octofold.launch.config import LaunchConfig, check
from octofold.launch.environment import foreseen, settings
from octofold.launch.node import config_hash
from octofold.launch.place import find_place, listening_ports
from octofold.launch.ports import hccl_port, meeting_port, own_ports, split_ports
from octofold.launch.rendezvous import Meeting, connect
from octofold.launch.rendezvous_config import RendezvousConfig

RANGE = "29400-29463"
SLURM = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "1000037", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
SLURM |= {"SLURM_JOB_CPUS_PER_NODE": "1(x2)"}


def test_a_range_has_both_its_ends():
    assert split_ports(RANGE) == range(29400, 29464)
    assert split_ports("1024-65535") == range(1024, 65536)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        *[(text, "FIRST-LAST") for text in ("", "29400", "a-b", "29463-29400", "29400-65536", "1-2-3", " 1-2", "١-٢")],
        ("1023-29400", "ports that a user may open, 1024 to 65535"),
    ],
)
def test_what_is_no_range_is_refused(text, rule):
    with pytest.raises(ConfigError, match=rule) as raised:
        check(LaunchConfig(ports=text))
    assert f"launch.ports={text}" in str(raised.value)
    assert "launch.ports=29400-29463" in str(raised.value)


@pytest.mark.parametrize(("text", "backend"), [("29400-29400", "cuda"), ("29400-29432", "ascend")])
def test_too_few_ports_are_refused_with_how_many_it_takes(text, backend):
    with pytest.raises(ConfigError) as raised:
        own_ports(text, backend)
    needed = 34 if backend == "ascend" else 2
    assert f"{needed} ports at least" in str(raised.value)
    remedy = f"29400-{29400 + needed - 1}"
    assert f"launch.ports={remedy}" in str(raised.value)
    assert len(own_ports(remedy, backend)) == 2


def test_hccl_gets_the_last_of_them_and_nobody_else_does():
    own, base = own_ports(RANGE, "ascend"), hccl_port(RANGE)
    assert own == range(29400, 29432)
    assert set(own) | set(range(base, base + 32)) == set(split_ports(RANGE))
    assert own_ports(RANGE, "cuda") == split_ports(RANGE)


def test_every_node_of_a_job_knows_where_it_meets_and_ranks_come_last():
    ports = range(100, 110)
    assert meeting_port(ports) == 100
    assert {meeting_port(ports, job) for job in range(50)} == set(range(100, 105))


@pytest.mark.parametrize(
    ("environ", "options", "port"),
    [
        ({}, {"hosts": ["n1", "n2"]}, 29400),
        (SLURM, {}, 29405),  # of 32, by the number of the job
        ({}, {"rendezvous": RendezvousConfig(endpoint="n1")}, 29400),
        ({}, {"rendezvous": RendezvousConfig(endpoint="n1:4242")}, 4242),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "23456", "RANK": "0"}, {}, 23456),
    ],
)
def test_nodes_meet_in_the_range_where_nobody_says_otherwise(environ, options, port):
    launch = LaunchConfig("torchrun", nodes=2, ports=RANGE, **options)
    assert find_place(launch, environ, listening_ports(launch, "cpu")).port == port


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "n1", "MASTER_PORT": "29440", "RANK": "0"}])
def test_a_place_to_meet_that_is_hccls_is_refused(environ):
    endpoint = None if environ else "n1:29440"
    launch = LaunchConfig("torchrun", nodes=2, ports=RANGE, rendezvous=RendezvousConfig(endpoint=endpoint))
    assert find_place(launch, environ, listening_ports(launch, "cpu")).port == 29440
    with pytest.raises(ConfigError, match=r"(?s)n1:29440.*29431 are HCCL's.*port 29400"):
        find_place(launch, environ, listening_ports(launch, "ascend"))


@pytest.mark.parametrize(("backend", "least"), [("cpu", "65534-65535"), ("ascend", "65502-65535")])
def test_the_remedy_is_no_mistake_itself(backend, least):
    with pytest.raises(ConfigError, match=f"remedy: launch.ports={least}"):
        own_ports("65535-65535", backend)
    assert own_ports(least, backend)


def test_pods_that_would_meet_elsewhere_are_refused():
    launch = compose(["launch=kubernetes", "launch.nodes=2", f"launch.ports={RANGE}"]).launch
    with pytest.raises(ConfigError, match=r"launch\.kubernetes\.port=29400"):
        listening_ports(launch, "cpu")
    inside = compose(["launch=kubernetes", f"launch.ports={RANGE}", "launch.kubernetes.port=29440"]).launch
    assert listening_ports(inside, "cpu") == split_ports(RANGE)
    with pytest.raises(ConfigError, match="29400 to 29431"):
        listening_ports(inside, "ascend")


@pytest.mark.parametrize(
    ("backend", "given", "expected"),
    [
        ("ascend", {}, "29432"),
        ("ascend", {"HCCL_IF_BASE_PORT": "50000"}, None),
        ("ascend", {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50050"}, None),
        ("cuda", {}, None),
    ],
)
def test_hccl_is_told_its_ports_where_the_user_has_not(backend, given, expected):
    found = {setting.name: setting.value for setting in settings(backend, "eth0", given, RANGE)}
    assert found.get("HCCL_IF_BASE_PORT") == expected
    assert "HCCL_IF_BASE_PORT" not in {setting.name for setting in settings(backend, "eth0", given)}


def test_a_dry_run_lists_hccls_port_with_its_reason(capsys):
    job = ["model=tiny", "launch=torchrun", "launch.nodes=2", "launch.hosts=[n1,n2]", "train.global_batch_size=64"]
    assert main(["launch", *job, "backend=ascend", f"launch.ports={RANGE}", "launch.dry_run=true"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "HCCL_IF_BASE_PORT" in line]
    assert "HCCL_IF_BASE_PORT=29432" in line
    assert "29432 to 29463, the last of launch.ports" in line
    assert main(["launch", *job, "backend=ascend", "launch.ports=29400-29420", "launch.dry_run=true"]) == 2
    assert "34 ports at least" in capsys.readouterr().err
    assert not [s for s in foreseen(compose([*job, f"launch.ports={RANGE}"])) if s.name == "HCCL_IF_BASE_PORT"]


def test_nodes_that_were_given_other_ports_differ():
    assert config_hash(compose([f"launch.ports={RANGE}"])) != config_hash(compose(["launch.ports=29500-29563"]))


@pytest.fixture
def held() -> Iterator[tuple[ExitStack, range]]:
    """Four ports in a row, all taken, and what lets go of them when it is closed."""
    for first in range(21000, 30000, 4):
        with ExitStack() as stack:
            try:
                for port in range(first, first + 4):
                    stack.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            yield stack, range(first, first + 4)
            return
    raise RuntimeError("no four ports are free")


def meeting(ports: range) -> Meeting:
    launch = LaunchConfig("torchrun", nodes=2, rendezvous=RendezvousConfig(endpoint=f"127.0.0.1:{ports[0]}"))
    place = find_place(launch, {"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ports)
    return Meeting(place, launch, connect(place, launch), "job", ports)


def ranks_port(found: Meeting) -> int:
    assert found._ranks_store is not None
    return found._ranks_store.port


def test_the_ranks_store_passes_by_what_is_taken(held):
    stack, ports = held
    stack.close()
    first = meeting(ports)
    assert ranks_port(first) == ports[3]
    with socket.create_server(("", ports[2])):
        assert ranks_port(Meeting(first._place, first._launch, first.store, "other", ports)) == ports[1]


def test_a_range_that_is_all_taken_is_named(held):
    stack, ports = held
    stack.close()
    with ExitStack() as taken:
        for port in ports[1:]:
            taken.enter_context(socket.create_server(("", port)))
        with pytest.raises(UserError) as raised:
            meeting(ports)
    assert f"launch.ports={ports[0]}-{ports[-1]}" in str(raised.value)
    assert "other processes hold them all" in str(raised.value)
