"""Which node of a job this machine is, and where its nodes meet: as configured or told by a scheduler. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.addresses import is_local, resolve
from octofold.launch.config import LaunchConfig
from octofold.launch.local import first_host
from octofold.launch.ports import meeting_port, own_ports, split_ports
from octofold.launch.rendezvous_config import DEFAULT_PORT, split_endpoint
from octofold.launch.slurm_allocation import check_allocation

SLURM_PORTS = 20000
"""Below those that the system gives to clients."""


@dataclass(frozen=True)
class Place:
    """This node among those of the job."""

    node_rank: int | None
    """None where nobody told: nodes are then numbered as they meet."""
    host: str
    """Where the first node listens."""
    port: int
    id: str | None
    """The scheduler's name of the job; None where there is none."""
    told_by: str
    """Who told the endpoint."""


def find_place(launch: LaunchConfig, environ: Mapping[str, str], ports: range | None = None) -> Place:
    """From `launch.rendezvous`, else what Kubernetes operators set, else Slurm, else `launch.hosts`.

    Args:
        ports: those of `launch.ports` for the meeting, where nobody tells one.

    Raises:
        UserError: nobody tells where to meet, it is a port that is HCCL's, or the scheduler has started another number
            of nodes.
    """
    config = launch.rendezvous
    usual = meeting_port(ports) if ports else DEFAULT_PORT
    told = _of_operator(environ, usual) or _of_slurm(environ, launch.nproc_per_node, ports) or _of_hosts(launch, usual)
    told = told or _alone(launch)
    if config.endpoint is not None:
        host, port = split_endpoint(config.endpoint, usual)
        known = told.place if told else None
        rank, job = (known.node_rank, known.id) if known else (None, None)
        place = Place(rank, host, port, job, "launch.rendezvous.endpoint")
    elif told:
        place = told.place
    else:
        rule = f"{launch.nodes} nodes meet at an address, and neither Slurm, Kubernetes nor launch.hosts tells one"
        raise ConfigError("launch.rendezvous.endpoint", "null", rule, f"node1:{DEFAULT_PORT}, the same on every node")
    if launch.ports and ports and place.port in split_ports(launch.ports) and place.port not in ports:
        shown, rule = f"{place.host}:{place.port}", f"of launch.ports={launch.ports} those after {ports[-1]} are HCCL's"
        raise ConfigError(place.told_by, shown, rule, f"port {ports[0]}, or one outside of launch.ports")
    if told and told.nodes not in (None, launch.nodes):
        rule = f"{told.place.told_by} tells of {told.nodes} node(s)"
        raise ConfigError("launch.nodes", launch.nodes, rule, f"launch.nodes={told.nodes}, or ask for {launch.nodes}")
    node_rank = config.node_rank if config.node_rank is not None else place.node_rank
    if config.backend == "static" and node_rank is None:
        rule = "with launch.rendezvous.backend=static every node knows its number"
        raise ConfigError("launch.rendezvous.node_rank", "null", rule, "0 on the first node, 1 on the second …")
    return Place(node_rank, place.host, place.port, config.id or place.id, place.told_by)


def listening_ports(launch: LaunchConfig, backend: str) -> range | None:
    """Those of `launch.ports` at which Octofold itself listens; None: there are none.

    Args:
        backend: `backend.name`.

    Raises:
        ConfigError: they are too few, or pods are to meet elsewhere.
    """
    if launch.ports is None:
        return None
    ports, port = own_ports(launch.ports, backend), launch.kubernetes.port
    if launch.name == "kubernetes" and port not in ports:
        shown = f"{launch.ports} launch.kubernetes.port={port}"
        rule = f"pods meet at one of them, {ports[0]} to {ports[-1]}"
        raise ConfigError("launch.ports", shown, rule, f"launch.kubernetes.port={ports[0]}")
    return ports


def hosts_store(place: Place) -> bool:
    """Whether this node is the one that listens.

    Raises:
        UserError: the endpoint's name has no address.
    """
    if place.node_rank is not None:
        return place.node_rank == 0
    try:
        return any(is_local(address) for address in resolve(place.host, place.port))
    except OSError as error:
        raise unresolved(place, error) from error


def unresolved(place: Place, error: OSError) -> UserError:
    """That the endpoint's name has no address here."""
    rule = f"nodes meet there, and the name has no address on this machine: {error.strerror or error}"
    remedy = "an address instead of the name, or mend DNS or /etc/hosts"
    return ConfigError(place.told_by, f"{place.host}:{place.port}", rule, remedy)


@dataclass(frozen=True)
class _Told:
    place: Place
    nodes: int | None
    """How many there are, where that is told."""


def _of_operator(environ: Mapping[str, str], usual: int) -> _Told | None:
    """PyTorchJob's and Volcano's: MASTER_ADDR and MASTER_PORT, RANK of the pod; PET_*, which torchrun reads too."""
    endpoint = environ.get("PET_RDZV_ENDPOINT")
    if endpoint:
        host, port = split_endpoint(endpoint, usual)
    elif {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= environ.keys() and "SLURM_NODEID" not in environ:
        host, port = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    else:
        return None
    rank = next((name for name in ("PET_NODE_RANK", "RANK", "VC_TASK_INDEX") if environ.get(name)), None)
    node_rank = _number(environ, rank) if rank else None
    nodes = environ.get("PET_NNODES", "")
    job = environ.get("PET_RDZV_ID")
    place = Place(node_rank, host, port, job, "the Kubernetes operator")
    return _Told(place, int(nodes) if nodes.isdigit() else None)


def _of_slurm(environ: Mapping[str, str], nproc_per_node: int, ports: range | None) -> _Told | None:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if "SLURM_NODEID" not in environ or not nodes:
        return None
    check_allocation(environ, nproc_per_node)
    count = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES") or "1"
    job = environ.get("SLURM_JOB_ID", "0")
    # A job that was requeued keeps its id; what an attempt before it left must not be met.
    name = f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    number = int(job) if job.isdigit() else None
    port = DEFAULT_PORT if number is None else SLURM_PORTS + number % 10000
    if ports:
        port = meeting_port(ports, number or 0)
    place = Place(_number(environ, "SLURM_NODEID"), first_host(nodes), port, name, "Slurm")
    return _Told(place, int(count))


def _of_hosts(launch: LaunchConfig, port: int) -> _Told | None:
    if not launch.hosts:
        return None
    node_rank = launch.rendezvous.node_rank
    if node_rank is None:
        node_rank = next((number for number, host in enumerate(launch.hosts) if _is_here(host)), None)
    place = Place(node_rank, launch.hosts[0], port, None, "launch.hosts")
    return _Told(place, len(launch.hosts))


def _is_here(host: str) -> bool:
    try:
        return any(is_local(address) for address in resolve(host))
    except OSError:
        return False


def _alone(launch: LaunchConfig) -> _Told | None:
    return _Told(Place(0, "localhost", 0, None, "launch.nodes=1"), 1) if launch.nodes == 1 else None


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise UserError(
            f"environment: {name}={environ[name]}\n  rule:   a whole number\n  remedy: mend the launcher's settings"
        )
    return int(environ[name])
