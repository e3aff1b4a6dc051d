"""`octofold launch launch=torchrun`: this node's agent, or over ssh the agents of all `launch.hosts`."""

import os
import shlex
from collections.abc import Sequence

from octofold.launch.config import JobConfig
from octofold.launch.members import least_nodes
from octofold.launch.submission import HERE, Submission, node_command


def prepare(config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> Submission:
    """One command a host over ssh, or that of this node (the same on each)."""
    flags = [text for folder in config_dirs for text in ("--config-dir", folder)]
    ssh = config.launch.ssh
    command = node_command(ssh.program or HERE, overrides, flags)
    if not ssh.enabled:
        notes = () if config.launch.nodes == 1 else (f"to be run on each of {config.launch.nodes} nodes",)
        return Submission({}, (tuple(command),), notes=notes)
    target = f"{ssh.user}@" if ssh.user else ""
    remote = remote_script(ssh.directory or os.getcwd(), command)
    # A password prompt would wait for ever, behind the output of other hosts.
    # The user's options come first, and so count. A host that is gone must not hold its ssh for ever.
    alive = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
    start = ("ssh", "-o", "BatchMode=yes", *ssh.options, *alive)
    return Submission({}, tuple((*start, "--", f"{target}{host}", remote) for host in config.launch.hosts))


def remote_script(directory: str, command: Sequence[str]) -> str:
    """POSIX shell that runs a command in a folder, and sends it SIGTERM when its standard input ends.

    ssh passes no signals on; its end, however it comes, closes the other side's standard input.
    """
    # A background job's input is /dev/null unless it is named, and a job started there ignores SIGINT.
    return "; ".join(
        [
            f"cd {shlex.quote(directory)} || exit 2",
            "exec 3<&0",
            f"{shlex.join(command)} 3<&- </dev/null & job=$!",
            # It must not hold the output, for whose end ssh waits.
            "(cat <&3; kill -TERM $job) >/dev/null 2>&1 & guard=$!",
            "wait $job; status=$?",
            "kill $guard 2>/dev/null",
            "exit $status",
        ]
    )


def check(submission: Submission) -> None:
    """Nothing else reads the commands: they were quoted here."""


def submit(submission: Submission, config: JobConfig) -> int:
    """Become this node's agent, or stay with those of all hosts until they have ended."""
    if not config.launch.ssh.enabled:
        (command,) = submission.commands
        os.execv(command[0], list(command))
    from octofold.launch.ssh import run_all

    commands = dict(zip(config.launch.hosts, submission.commands, strict=True))
    return run_all(commands, config.launch.stop_deadline_s, spare=config.launch.nodes - least_nodes(config.launch))
