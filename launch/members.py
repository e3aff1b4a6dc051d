"""Which of the nodes that have met run ranks: those that are fit, as many as the layout can use. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from octofold.backends.errors import ConfigError, UserError
from octofold.backends.rank_table import VARIABLE
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.parallel.config import DENSE_DEGREES
from octofold.train.config import validate

OF_EACH = ("name", "node_rank", "complaints")
"""What a node tells of itself in which it may differ."""


def least_nodes(launch: LaunchConfig) -> int:
    """How many nodes the job needs."""
    return launch.min_nodes or launch.nodes


def fitted(config: JobConfig, present: int) -> JobConfig:
    """The job on as many of `present` nodes as its layout and its batch can be divided among.

    Args:
        config: with `parallel.data_shard` as the user gave it, -1 where it follows from the ranks.

    Returns:
        The config with its degrees filled in (`nodes_of` tells for how many nodes); `launch.nodes` stays.

    Raises:
        ConfigError: what forbids it on all that are present, where no smaller number down to `launch.min_nodes` will
            do either.
    """
    first: ConfigError | None = None
    for nodes in range(present, min(least_nodes(config.launch), present) - 1, -1):
        try:
            checked = validate(config, nodes * config.launch.nproc_per_node)
        except ConfigError as error:
            first = first or error
            continue
        assert isinstance(checked, JobConfig)
        return checked
    assert first is not None
    raise first


def nodes_of(config: JobConfig) -> int:
    """On how many nodes a validated job runs ranks."""
    return prod(getattr(config.parallel, name) for name in DENSE_DEGREES) // config.launch.nproc_per_node


def require_alike(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise `UserError` naming the nodes that differ from the first, and in what.

    Args:
        nodes: what each told of itself (`octofold.launch.node`).
    """
    first, lines = nodes[0], []
    for key in (key for key in first if key not in OF_EACH):
        others = [node for node in nodes if node.get(key) != first[key]]
        if others:
            told = ", ".join(f"{node['name']} {node.get(key)}" for node in others[:8])
            lines.append(f"{key}: {first['name']} {first[key]}, {told}")
    if lines:
        shown = "\n".join(lines)
        rule = "every node has the same versions and composes the same job"
        raise UserError(f"nodes differ in {shown}\n  rule:   {rule}\n  remedy: start the same command everywhere")


def require_no_table(environ: Mapping[str, str], launch: LaunchConfig) -> None:
    """Raise `ConfigError` for a rank table in a job that may go on with fewer nodes than it lists."""
    if environ.get(VARIABLE) and least_nodes(launch) < launch.nodes:
        shown = f"launch.min_nodes={launch.min_nodes} {VARIABLE}={environ[VARIABLE]}"
        rule = "a rank table lists the nodes of a job, none of which may then be missing"
        raise ConfigError("launch.min_nodes", shown, rule, f"unset {VARIABLE}, or launch.min_nodes=null")


def fit_nodes(nodes: Sequence[Mapping[str, Any]], launch: LaunchConfig) -> list[int]:
    """The numbers of the nodes without complaints, in the order in which they run ranks: by `node_rank`, if it is told.

    Raises:
        UserError: naming the others, where fewer are left than the job needs.
    """
    fit = [number for number, node in enumerate(nodes) if not node["complaints"]]
    fit.sort(key=lambda number: (nodes[number]["node_rank"] is None, nodes[number]["node_rank"] or 0, number))
    ill = [f"{node['name']}: {complaint}" for node in nodes for complaint in node["complaints"]]
    if ill and len(fit) < least_nodes(launch):
        shown = "\n  ".join(["nodes are not fit", *ill])
        rule = "nothing fails on a node that octofold doctor checks"
        remedy = "mend it, leave the node out (launch.min_nodes), or launch.preflight.doctor=false"
        raise UserError(f"{shown}\n  rule:   {rule}\n  remedy: {remedy}")
    return fit


def refitted(config: JobConfig, drafted: JobConfig, present: int) -> JobConfig:
    """A job that has begun, on another number of nodes.

    Args:
        config: proved, of the first attempt.
        drafted: the same before its degrees were filled in.

    Raises:
        ConfigError: see `fitted`.
    """
    return fitted(replace(config, parallel=drafted.parallel), present)


def standing_by(nodes: Sequence[Mapping[str, Any]], running: Sequence[int]) -> dict[int, str]:
    """Why each of the other nodes runs no ranks."""
    why = f"the layout uses {len(running)} of the nodes that are fit"
    rest = [number for number in range(len(nodes)) if number not in running]
    return {number: "; ".join(nodes[number]["complaints"]) or why for number in rest}
