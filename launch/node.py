"""`octofold train launch=torchrun`: this process is the agent of one node of a job, and starts the node's ranks.

Every node composes the job from the same overrides. The node of rank 0 proves it, makes the run's folder and writes
config.yaml; the others compare what they composed with what it did, and take its config.yaml.
"""

import hashlib
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.addresses import interface_of
from octofold.launch.compose import parse
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.config import check as check_launch
from octofold.launch.environment import backend_here, settings
from octofold.launch.failures import USERS_MISTAKE
from octofold.launch.job import Job, settle
from octofold.launch.local import Ended, ended_with, note_end, rank_environment
from octofold.launch.members import (
    fit_nodes,
    nodes_of,
    refitted,
    require_alike,
    require_no_table,
    standing_by,
)
from octofold.launch.node_agent import NodeAgent
from octofold.launch.place import Place, find_place, listening_ports
from octofold.launch.preflight import complaints
from octofold.launch.rank_table import wait_until_filled
from octofold.launch.rendezvous import Meeting, connect, run_id_of
from octofold.launch.restart import mark_start
from octofold.launch.run_folder import CONFIG_NAME, default_run_dir, make_run_folder, to_yaml, write_config
from octofold.launch.run_lock import locked
from octofold.launch.train import tell_changes, undo
from octofold.train.history import append
from octofold.train.metrics import read_metrics

VISIBLE_S = 10.0
"""What a shared file system may take to show one machine what another wrote."""
LOCK_WAIT_S = 15.0
"""An earlier attempt of a scheduler's job may just be ending, which other machines learn with a delay."""


def run_node(drafted: JobConfig, texts: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Be the agent of this node until the job has ended; returns the exit status.

    Args:
        drafted: what `draft` made of the overrides `texts`.

    Raises:
        UserError: a job that cannot be run, or nodes that do not meet.
    """
    launch = drafted.launch
    check_launch(launch)
    ports = listening_ports(launch, backend_here(drafted.backend.name))
    place = find_place(launch, os.environ, ports)
    if launch.nodes > 1 and any(o.key_or_group == "resume" and o.value() == "latest" for o in parse(texts)):
        rule = "every node must find the same run, and each would look for itself"
        raise ConfigError("resume", "latest", rule, f"resume={drafted.run_dir}, or octofold launch, which looks once")
    environ = os.environ | launch.environment
    require_no_table(environ, launch)
    wait_until_filled(environ, launch.rendezvous.timeout_s)
    node = _Node(drafted, texts, config_dirs, place)
    store = connect(place, launch)
    meeting = Meeting(place, launch, store, run_id_of(place, node.run_dir), ports if launch.nodes > 1 else None)
    interface = interface_of(meeting.address) if launch.nodes > 1 else None
    own = settings(drafted.backend.name, interface, environ, launch.ports)
    os.environ.update({setting.name: setting.value for setting in own} | launch.environment)
    for setting in own:
        print(f"octofold: {setting.name}={setting.value}  ({setting.why})", file=sys.stderr, flush=True)
    with ExitStack() as held:
        node.held = held
        agent = NodeAgent(launch, node.run_dir, meeting, node.facts(), node.answer, node.take)
        try:
            with rank_environment(launch.nproc_per_node), agent.handling_signals():
                result = agent.run()
            ended = ended_with(agent, result)
        except UserError as error:
            node.conclude(Ended(error.status))
            raise
        finally:
            heard = agent.close()
        node.conclude(ended)
    if heard and not agent.left_early:
        meeting.shutdown()
    if ended.status or not launch.unfinished_status or _is_finished(node.run_dir, drafted.train.steps):
        return ended.status
    return launch.unfinished_status


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Whether the run has made its last step, and closed."""
    return any(record["kind"] == "final" and record["step"] >= steps for record in read_metrics(run_dir))


def _folder(drafted: JobConfig, place: Place) -> Path:
    run_dir = drafted.run_dir
    if run_dir is None:
        if place.id is None:
            rule = "every node must find the same folder, and no scheduler gives the job an id"
            raise ConfigError("run_dir", "null", rule, "run_dir=FOLDER")
        run_dir = str(default_run_dir(drafted.name, place.id))
    return Path(run_dir).expanduser().absolute()


class _Node:
    """What this node tells, answers as the leader, and takes from it."""

    def __init__(self, drafted: JobConfig, texts: Sequence[str], config_dirs: Sequence[str], place: Place) -> None:
        self._drafted, self._texts, self._config_dirs = drafted, texts, config_dirs
        self._place, self.run_dir = place, _folder(drafted, place)
        self.held = ExitStack()
        self._job: Job | None = None
        self._running: list[str] | None = None
        self._previous: str | None = None

    def facts(self) -> dict[str, Any]:
        """What must be the same on every node, and this one's name."""
        return {
            # Slurm names nodes by its own configuration.
            "name": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "node_rank": self._place.node_rank,
            "python": platform.python_version(),
            "torch": version("torch"),
            "octofold": version("octofold"),
            "launch.nproc_per_node": self._drafted.launch.nproc_per_node,
            "configuration": config_hash(self._drafted),
            "complaints": complaints(self.run_dir, self._drafted) if self._examines() else [],
        }

    def _examines(self) -> bool:
        launch = self._drafted.launch
        # The doctor looks for what a real NPU needs, CANN and a driver among it.
        return launch.nodes > 1 and launch.preflight.doctor and not self._drafted.backend.software

    def answer(self, nodes: list[dict[str, Any]]) -> dict[str, Any]:
        """The leader's: the job's config.yaml and the nodes that run ranks, or why there are none."""
        try:
            require_alike(nodes)
            fit = fit_nodes(nodes, self._drafted.launch)
            config = self._begin(len(fit)) if self._job is None else self._go_on(self._job, len(fit))
        except UserError as error:
            return {"error": str(error), "status": error.status}
        running = fit[: nodes_of(config)]
        others = {nodes[number]["name"]: why for number, why in standing_by(nodes, running).items()}
        self._tell_nodes([nodes[number]["name"] for number in running], others)
        return {"config": to_yaml(config), "running": running, "standing_by": others}

    def _tell_nodes(self, running: list[str], others: dict[str, str]) -> None:
        """Say which nodes run ranks, where that is news."""
        if self._running is None and len(running) == self._drafted.launch.nodes:
            self._running = running
        if running == self._running:
            return
        self._running = running
        of = f"{len(running)} of launch.nodes={self._drafted.launch.nodes}"
        lines = [f"{of} run ranks: {', '.join(running)}", *(f"{name} stands by: {why}" for name, why in others.items())]
        print("\n".join(f"octofold: {line}" for line in lines), file=sys.stderr, flush=True)
        with suppress(OSError):  # it is told on the console, too
            append(self.run_dir, "nodes", running=running, standing_by=others)

    def _go_on(self, job: Job, present: int) -> JobConfig:
        config = refitted(job.config, self._drafted, present)
        if config != job.config:
            write_config(self.run_dir, config)
            self._job = replace(job, config=config)
        return config

    def _begin(self, present: int) -> JobConfig:
        launch = self._drafted.launch
        drafted = replace(self._drafted, run_dir=str(self.run_dir), launch=replace(launch, nodes=present))
        job = settle(self._texts, self._config_dirs, drafted=drafted)
        run_dir = make_run_folder(job.config, resuming=job.reuse_folder)
        config = replace(job.config, run_dir=str(run_dir), launch=launch)
        self.held.enter_context(locked(self.run_dir, wait_s=LOCK_WAIT_S))
        tell_changes(job, self.run_dir)
        mark_start(self.run_dir, config)
        self._previous = write_config(self.run_dir, config)
        self._job = replace(job, config=config)
        return config

    def take(self, said: dict[str, Any]) -> str | None:
        """Every node's: what is wrong with the leader's answer here, as `STATUS` and a message; None: nothing."""
        if "error" in said:
            return f"{said['status']}\n{said['error']}"
        try:
            self._require_folder(said["config"], said["names"][0])
        except UserError as error:
            return f"{error.status}\nnode {socket.gethostname()}: {error}"
        return None

    def _require_folder(self, yaml: str, leader: str) -> None:
        """See that the run's folder is the leader's, or else that only logs are to go there.

        Raises:
            ConfigError: neither is so.
        """
        path, deadline_s = self.run_dir / CONFIG_NAME, time.monotonic() + VISIBLE_S
        while not (path.is_file() and path.read_text(encoding="utf-8") == yaml):
            if time.monotonic() < deadline_s:
                time.sleep(0.1)
                continue
            if "://" not in (self._drafted.checkpoint.dir or ""):
                rule = f"every node finds the same folder, and what {leader} wrote there is not here"
                remedy = "a folder that all nodes share, or a store for checkpoints: checkpoint.dir=s3://BUCKET/FOLDER"
                raise ConfigError("run_dir", str(self.run_dir), rule, remedy)
            make_run_folder(replace(self._drafted, run_dir=str(self.run_dir)), resuming=True)
            path.write_text(yaml, encoding="utf-8")
        (self.run_dir / "logs").mkdir(exist_ok=True)

    def conclude(self, ended: Ended) -> None:
        """The leader's: note the end; after a user's mistake the folder is as before, for the next attempt."""
        if self._job is None:
            return
        if ended.status == USERS_MISTAKE:
            undo(self._job.config, self.run_dir, self._previous)
        else:
            note_end(self.run_dir, ended)


def config_hash(drafted: JobConfig) -> str:
    """A digest of everything configured but what each node has of its own: its number, and what it starts."""
    rendezvous = replace(drafted.launch.rendezvous, node_rank=None)
    launch = LaunchConfig(
        nodes=drafted.launch.nodes,
        min_nodes=drafted.launch.min_nodes,
        nproc_per_node=drafted.launch.nproc_per_node,
        ports=drafted.launch.ports,
        rendezvous=rendezvous,
    )
    return hashlib.sha256(to_yaml(replace(drafted, launch=launch)).encode()).hexdigest()[:16]
