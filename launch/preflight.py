"""Before the first step of a job of several nodes: what each says of itself, and how fast the links are."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from octofold.backends.base import Backend
from octofold.backends.collectives import all_gather_bytes
from octofold.backends.config import BackendConfig
from octofold.backends.links import MIB, LinkTime, measure_links, slow_nodes, weak_links
from octofold.backends.process_group import RankInfo
from octofold.backends.topology import Topology
from octofold.launch.config import JobConfig
from octofold.launch.doctor import diagnose
from octofold.launch.doctor_finding import FAIL
from octofold.launch.failures import SlowNodesError
from octofold.launch.preflight_config import PreflightConfig

MOST_TOLD = 8
"""Links named in one message."""


def complaints(run_dir: Path, job: JobConfig) -> list[str]:
    """What fails on this node, as `octofold doctor` sees it for the node's ranks."""
    each = job.launch.nproc_per_node
    ranks = {"RANK": 0, "WORLD_SIZE": job.launch.nodes * each, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": each}
    if job.backend.name == "cpu":
        # There may be fewer devices than ranks.
        ranks |= {"LOCAL_WORLD_SIZE": 1}
    # Where an operator sets these they count pods, and the agent itself listens at the port.
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environ = os.environ | job.launch.environment | meeting | {name: str(number) for name, number in ranks.items()}
    found = [finding for finding in diagnose(environ, run_dir) if finding.status == FAIL]
    return [f"{finding.name}: {finding.what}\n          remedy: {finding.remedy}" for finding in found]


def links_check(config: PreflightConfig, backend: BackendConfig) -> Callable[[Backend, RankInfo], None]:
    """What ranks do, in their process group, before anything is built. Collective."""

    def check(made: Backend, info: RankInfo) -> None:
        topology = Topology.read(backend, info)
        names = _node_names(topology, made, info)
        times = measure_links(topology, made.device(info.local_rank), config.message_mib * MIB)
        if info.rank == 0:
            print("\n".join(["links between nodes", *table(times, names)]), flush=True)
        slow, weak = slow_nodes(times, config.slow_factor), weak_links(times, config.least_gb_s)
        if not slow and not weak:
            return
        told = ", ".join(f"{names[node]} ({times_:.1f} times the usual)" for node, times_ in sorted(slow.items()))
        limit = f"launch.preflight.slow_factor={config.slow_factor:g}"
        rule = f"no node's links take more than {limit} times what is usual"
        if not slow:
            shown = [f"{' - '.join(names[node] for node in each.nodes)} {_speed(each).strip()}" for each in weak]
            told = ", ".join(shown[:MOST_TOLD])
            rule = f"links give what launch.preflight.least_gb_s={config.least_gb_s} asks of their class"
        if config.stop_on_slow:
            remedy = "leave it out (launch.min_nodes), see its links, or launch.preflight.stop_on_slow=false"
            raise SlowNodesError(f"slow: {told}\n  rule:   {rule}\n  remedy: {remedy}", slow)
        if info.rank == 0:
            print(f"octofold: slow: {told}", flush=True)

    return check


def _node_names(topology: Topology, backend: Backend, info: RankInfo) -> list[str]:
    told = all_gather_bytes(json.dumps(socket.gethostname()).encode(), backend.device(info.local_rank))
    return [str(json.loads(name)) for name in told[:: topology.ranks_per_node]]


def table(times: list[LinkTime], names: list[str]) -> list[str]:
    """Lines of nodes, collective, and what one rank sends a second."""
    rows = [(" - ".join(names[node] for node in time.nodes), time.collective, time) for time in times]
    width = max(len(name) for name, _, _ in rows) if rows else 0
    return [
        f"  {name:{width}}  {collective:10}  {_speed(time)}, {time.seconds * 1e3:.1f} ms"
        for name, collective, time in rows
    ]


def _speed(time: LinkTime) -> str:
    return f"{time.bytes_per_s / 1e9:8.3f} GB/s a rank ({time.link})"
