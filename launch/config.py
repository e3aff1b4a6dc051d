"""The whole job as the command line sees it: a run and how its ranks are started. Torch-free."""

import re
from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError
from octofold.launch.kubernetes_config import KubernetesConfig, check_kubernetes
from octofold.launch.ports import split_ports
from octofold.launch.preflight_config import PreflightConfig, check_preflight
from octofold.launch.rendezvous_config import RendezvousConfig, check_rendezvous
from octofold.launch.slurm_config import SlurmConfig, check_slurm
from octofold.launch.ssh_config import SshConfig, check_ssh
from octofold.train.config import RunConfig

ENGINES = {
    "torchrun": "octofold.launch.torchrun",
    "slurm": "octofold.launch.slurm",
    "kubernetes": "octofold.launch.kubernetes",
}
"""What `octofold launch` starts a job with, and the module that does it (launch/submit.py)."""
NAMES = ("local", *ENGINES)


@dataclass(frozen=True)
class LaunchConfig:
    """The `launch` group."""

    name: str = "local"
    """local: ranks of this machine. torchrun: this process is the agent of one of launch.nodes nodes."""
    nproc_per_node: int = 1
    """Ranks to start on this machine; ignored where a launcher has already started them."""
    nodes: int = 1
    """Machines, pods or Slurm nodes, each with nproc_per_node ranks."""
    min_nodes: int | None = None
    """The job goes on with so many, where others are lost, unfit or slow: on as many as its layout and its batch can be
    divided among; the rest stand by for those that fail. null: it needs all."""
    stop_deadline_s: float = 30.0
    """Ranks save and end within this after Ctrl-C, SIGTERM or SIGUSR1; those that do not are killed."""
    unfinished_status: int = 0
    """Exit status of a node of a run that a signal has stopped, and that has saved before its last step. Those that
    take 0 for the job's end, as Kubernetes' operators do, need another; launch=kubernetes gives 143."""
    max_restarts: int = 3
    """How often ranks are started again when one of them has failed, to go on from the newest valid checkpoint. Ranks
    that a launcher has started are its own to restart (torchrun --max-restarts)."""
    dry_run: bool = False
    """`octofold launch` prints what it would write and run, and checks it, instead of doing it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks, over what is set around them: launch.environment={NCCL_DEBUG:INFO}."""
    hosts: list[str] = field(default_factory=list)
    """Names or addresses of the nodes, the first one first."""
    ports: str | None = None
    """FIRST-LAST: where agents and ranks' store listen for other nodes, and HCCL on Ascend (docs/launching.md). null:
    where launch.rendezvous.endpoint says, and where the system chooses."""
    rendezvous: RendezvousConfig = field(default_factory=RendezvousConfig)
    ssh: SshConfig = field(default_factory=SshConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


@dataclass(frozen=True)
class JobConfig(RunConfig):
    """`RunConfig` with the launcher beside it."""

    resume_allow: list[str] = field(default_factory=list)
    """Keys, with * and ?, by which a continued run may leave the course of the saved one (launch/changes.py)."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def check(launch: LaunchConfig) -> None:
    """Raise `ConfigError` for a launcher that cannot be honoured."""
    if launch.name not in NAMES:
        raise ConfigError("launch.name", launch.name, f"one of {', '.join(NAMES)}", "launch=local")
    for key in ("nproc_per_node", "nodes"):
        if getattr(launch, key) < 1:
            what = {"nproc_per_node": "at least one rank", "nodes": "at least one node"}[key]
            raise ConfigError(f"launch.{key}", getattr(launch, key), what, f"launch.{key}=1")
    if launch.name == "local" and launch.nodes > 1:
        shown = f"local launch.nodes={launch.nodes}"
        rule = "local ranks are those of one machine"
        raise ConfigError("launch.name", shown, rule, "octofold launch launch=torchrun (or slurm, kubernetes)")
    if not 0 <= launch.stop_deadline_s < float("inf"):
        raise ConfigError("launch.stop_deadline_s", launch.stop_deadline_s, "a number of seconds", "30")
    if not 0 <= launch.unfinished_status < 256:
        raise ConfigError("launch.unfinished_status", launch.unfinished_status, "an exit status, 0 to 255", "143")
    if launch.max_restarts < 0:
        raise ConfigError("launch.max_restarts", launch.max_restarts, "a count", "launch.max_restarts=0 for none")
    _check_environment(launch.environment)
    _check_hosts(launch)
    check_rendezvous(launch.rendezvous, launch.nodes)
    if launch.ports is not None:
        split_ports(launch.ports)
    _check_min_nodes(launch)
    check_ssh(launch.ssh, launch.hosts)
    check_preflight(launch.preflight)
    if launch.name == "slurm":
        check_slurm(launch.slurm, launch.stop_deadline_s)
    if launch.name == "kubernetes":
        check_kubernetes(launch.kubernetes)


def _check_environment(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            rule = "names of variables are letters, digits and _"
            raise ConfigError("launch.environment", name, rule, "launch.environment={NAME:VALUE}")
        if "\0" in value:
            raise ConfigError("launch.environment", name, "no variable holds a NUL character", "another value")


def _check_min_nodes(launch: LaunchConfig) -> None:
    if launch.min_nodes is None:
        return
    if not 1 <= launch.min_nodes <= launch.nodes:
        rule = f"from 1 to launch.nodes={launch.nodes}"
        raise ConfigError("launch.min_nodes", launch.min_nodes, rule, "launch.min_nodes=null, which needs all")
    if launch.min_nodes < launch.nodes and launch.rendezvous.backend == "static":
        shown = f"{launch.min_nodes} launch.rendezvous.backend=static"
        rule = "with the static rendezvous every node keeps its number, and none can be missing"
        raise ConfigError("launch.min_nodes", shown, rule, "launch.rendezvous.backend=c10d")
    if launch.rendezvous.last_call_s >= launch.rendezvous.timeout_s:
        shown = f"{launch.rendezvous.last_call_s:g} launch.rendezvous.timeout_s={launch.rendezvous.timeout_s:g}"
        rule = "the last call is part of the time in which nodes meet"
        raise ConfigError("launch.rendezvous.last_call_s", shown, rule, "a shorter one, or a longer timeout_s")


def _check_hosts(launch: LaunchConfig) -> None:
    for host in launch.hosts:
        # What ssh, and every resolver, takes for a name; an option (-o...) is none.
        if not re.fullmatch(r"(?!-)[A-Za-z0-9_.:%-]+", host):
            raise ConfigError("launch.hosts", host, "names or addresses of machines", "launch.hosts=[node1,node2]")
    if len(set(launch.hosts)) < len(launch.hosts):
        raise ConfigError("launch.hosts", launch.hosts, "every node is a machine of its own", "each name once")
    if launch.hosts and launch.name == "torchrun" and len(launch.hosts) != launch.nodes:
        shown = f"{len(launch.hosts)} names launch.nodes={launch.nodes}"
        raise ConfigError("launch.hosts", shown, "one name for each node", f"launch.nodes={len(launch.hosts)}")
