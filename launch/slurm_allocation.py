"""Whether the nodes that Slurm has given a job are alike: ranks are counted per node, the same number on each."""

import re
from collections.abc import Mapping

from octofold.backends.errors import UserError

PER_NODE = {
    "SLURM_STEP_TASKS_PER_NODE": "one agent runs on each node; srun --ntasks-per-node=1",
    "SLURM_TASKS_PER_NODE": "one agent runs on each node; --ntasks-per-node=1",
    "SLURM_JOB_CPUS_PER_NODE": "nodes of one kind: launch.slurm.constraint, nodelist or cpus_per_node",
}
"""Slurm's lists over nodes, such as 8(x3),4, and the remedy where their numbers differ."""


def check_allocation(environ: Mapping[str, str], nproc_per_node: int) -> None:
    """Raise `UserError` for nodes of different sizes, parts of a heterogeneous job, or too few GPUs on this node.

    Args:
        environ: of a task that srun has started.
        nproc_per_node: ranks that are to run here.
    """
    parts = environ.get("SLURM_HET_SIZE", "1")
    if parts != "1":
        _refuse(f"SLURM_HET_SIZE={parts}", "one job is one kind of node", "a job without `:` between its parts")
    for name, remedy in PER_NODE.items():
        value = environ.get(name, "")
        if "," in value:
            nodes = environ.get("SLURM_JOB_NODELIST", "")
            _refuse(f"{name}={value} on {nodes}", "every node of a job has the same size", remedy)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if re.fullmatch(r"\d+", gpus) and int(gpus) < nproc_per_node:
        node = environ.get("SLURMD_NODENAME", "this node")
        rule = f"a GPU for each of launch.nproc_per_node={nproc_per_node} ranks"
        _refuse(f"SLURM_GPUS_ON_NODE={gpus} on {node}", rule, f"launch.slurm.gpus_per_node={nproc_per_node}")


def _refuse(shown: str, rule: str, remedy: str) -> None:
    raise UserError(f"Slurm: {shown}\n  rule:   {rule}\n  remedy: {remedy}")
