"""Which node this machine is and where nodes meet, from what each kind of scheduler sets."""

import pytest

from octofold.backends.errors import UserError
from octofold.launch.addresses import address_towards, interface_addresses, interface_of, is_local, resolve
from octofold.launch.config import LaunchConfig
from octofold.launch.place import Place, find_place, hosts_store
from octofold.launch.rendezvous_config import RendezvousConfig, split_endpoint

SLURM = {
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "30017",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
}
PYTORCHJOB = {
    **{"MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "16"},
    **{"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"},
}
VOLCANO = {"MASTER_ADDR": "run-node-0.run", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "2"}
ELASTIC = {"PET_RDZV_ENDPOINT": "run-worker-0:29500", "PET_RDZV_ID": "run", "PET_NNODES": "2:2"}


def place(environ, nodes=2, hosts=(), **rendezvous):
    meeting = RendezvousConfig(**rendezvous)
    return find_place(LaunchConfig("torchrun", nodes=nodes, hosts=list(hosts), rendezvous=meeting), environ)


@pytest.mark.parametrize(
    ("environ", "node_rank", "host", "port", "job"),
    [
        (SLURM, 1, "gpu07", 20017, "30017.0"),
        (SLURM | {"SLURM_RESTART_COUNT": "2"}, 1, "gpu07", 20017, "30017.2"),
        (PYTORCHJOB, 1, "run-master-0", 23456, None),
        (VOLCANO, 1, "run-node-0.run", 23456, None),
        (ELASTIC, None, "run-worker-0", 29500, "run"),
        # Slurm's own variables count where its prolog sets MASTER_ADDR, too.
        (SLURM | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "1", "RANK": "7"}, 1, "gpu07", 20017, "30017.0"),
    ],
)
def test_a_scheduler_tells_all(environ, node_rank, host, port, job):
    found = place(environ)
    assert (found.node_rank, found.host, found.port, found.id) == (node_rank, host, port, job)


def test_what_is_configured_counts_before_what_a_scheduler_tells():
    found = place(SLURM, endpoint="head:4242", node_rank=0, id="mine")
    assert (found.node_rank, found.host, found.port, found.id) == (0, "head", 4242, "mine")
    assert place(SLURM, endpoint="head").node_rank == 1, "Slurm's number, where only the endpoint is given"


def test_a_host_finds_itself_in_the_list():
    found = place({}, hosts=["192.0.2.1", "localhost"])
    assert (found.node_rank, found.host, found.port) == (1, "192.0.2.1", 29400)
    assert not hosts_store(found)
    assert hosts_store(place({}, hosts=["localhost", "192.0.2.1"]))


def test_without_a_number_the_node_that_has_the_address_listens():
    assert hosts_store(Place(None, "127.0.0.1", 1, None, ""))
    assert not hosts_store(Place(None, "192.0.2.1", 1, None, ""))
    with pytest.raises(UserError, match="has no address on this machine"):
        hosts_store(Place(None, "nowhere.invalid", 1, None, "launch.rendezvous.endpoint"))


def test_one_node_meets_itself():
    assert place({}, nodes=1) == Place(0, "localhost", 0, None, "launch.nodes=1")


@pytest.mark.parametrize(
    ("environ", "options", "parts"),
    [
        ({}, {}, ["launch.rendezvous.endpoint=null", "2 nodes meet at an address", "the same on every node"]),
        (SLURM, {"nodes": 3}, ["launch.nodes=3", "Slurm tells of 2 node(s)", "launch.nodes=2"]),
        (PYTORCHJOB, {"nodes": 4}, ["the Kubernetes operator tells of 2 node(s)"]),
        (PYTORCHJOB | {"PET_NODE_RANK": "one"}, {}, ["PET_NODE_RANK=one", "a whole number"]),
        (ELASTIC, {"backend": "static"}, ["launch.rendezvous.node_rank=null", "every node knows its number"]),
    ],
)
def test_what_cannot_be_is_named(environ, options, parts):
    with pytest.raises(UserError) as raised:
        place(environ, **options)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("node1", ("node1", 29400)),
        ("node1:80", ("node1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("[::1]", ("::1", 29400)),
    ],
)
def test_endpoints_are_host_and_port(endpoint, expected):
    assert split_endpoint(endpoint) == expected


@pytest.mark.parametrize("endpoint", ["", ":80", "a:b", "a:0", "a:65536", "fe80::1", "a b:80", "[::1", "a:80:90"])
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(UserError, match="HOST:PORT, with a port from 1 to 65535"):
        split_endpoint(endpoint)


def test_addresses_of_this_machine():
    known = interface_addresses()
    assert "127.0.0.1" in known["lo"]
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.1")
    assert "127.0.0.1" in resolve("localhost")
    mine = address_towards("127.0.0.1", 80)
    others = [address for name, addresses in known.items() if name != "lo" for address in addresses]
    assert mine == (others[0] if others else "127.0.0.1"), "others do not reach this machine by loopback"
