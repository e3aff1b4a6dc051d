"""`octofold launch` over a real ssh, between hosts that are network namespaces."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hosts import WHY_NOT, Host, ended, hosts
from test_hosts_train import JOB, LIMIT_S, SMALL, losses, outputs, wait_for_step

from octofold.launch.status import status_of

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
WHY = WHY_NOT or ("" if SSHD and shutil.which("ssh-keygen") else "openssh-server is not installed")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY), reason=WHY),
    pytest.mark.timeout(300),
]


@pytest.fixture
def reached(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[list[Host], list[str]]]:
    """Hosts, two unless a test asks for more, that accept one key, and the options by which ssh uses it."""
    key, host_key = tmp_path / "key", tmp_path / "host_key"
    for path in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = [f"HostKey={host_key}", f"AuthorizedKeysFile={key}.pub", "StrictModes=no", "UsePAM=no", "PidFile=none"]
    options = [
        "-i",
        str(key),
        "-oStrictHostKeyChecking=no",
        f"-oUserKnownHostsFile={tmp_path}/known",
        "-oLogLevel=ERROR",
    ]
    with hosts(getattr(request, "param", 2), tmp_path) as group:
        for host in group:
            sshd = [str(SSHD), "-D", "-f", "/dev/null", *(f"-o{setting}" for setting in settings)]
            host.start(sshd, tmp_path / f"{host.name}.sshd")
        deadline_s = time.monotonic() + 20
        for host in group:
            probe = ["ssh", *options, "-oConnectTimeout=1", host.name, "true"]
            while group[0].start(probe, tmp_path / "probe").wait(20) and time.monotonic() < deadline_s:
                time.sleep(0.2)
        yield group, options


def launch(group: list[Host], options: Sequence[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """`octofold launch` on node0."""
    command = [sys.executable, "-m", "octofold.launch.cli", "launch", *JOB, *SMALL, f"run_dir={folder / 'run'}"]
    quoted = ",".join(f'"{option}"' for option in options)
    names = ",".join(host.name for host in group)
    ssh = [f"launch.hosts=[{names}]", "launch.ssh.enabled=true", f"launch.ssh.options=[{quoted}]"]
    job = ["launch=torchrun", f"launch.nodes={len(group)}", "launch.nproc_per_node=1", "launch.preflight.doctor=false"]
    return group[0].start([*command, *job, *ssh, *more], folder / "launch.out")


def test_one_command_starts_every_host_and_ends_with_them(reached, tmp_path):
    group, options = reached
    assert ended([launch(group, options, tmp_path, "train.steps=3")], LIMIT_S) == [0], outputs(tmp_path)
    assert max(losses(tmp_path / "run")) == 3
    said = outputs(tmp_path)
    assert "node0: step 3/3" in said
    assert "node1: step" not in said


def test_a_signal_to_the_command_has_every_host_save(reached, tmp_path):
    group, options = reached
    process = launch(group, options, tmp_path, "train.steps=4000")
    wait_for_step(tmp_path / "run", 2, [process])
    pid = subprocess.run(["pgrep", "-f", f"octofold.launch.cli launch .*{tmp_path}"], capture_output=True, text=True)
    for number in pid.stdout.split():
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", number], check=False)
    assert ended([process], 90) == [0], outputs(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))


def test_a_host_that_is_not_reached_is_named(reached, tmp_path):
    group, options = reached
    group[1].cut()
    process = launch(group, [*options, "-oConnectTimeout=3"], tmp_path, "launch.rendezvous.timeout_s=20")
    assert ended([process], 90) == [1], outputs(tmp_path)
    assert "ssh did not reach node1, or lost it" in outputs(tmp_path)


def agent_on(host: Host) -> psutil.Process:
    """The agent that sshd has started there."""
    told = subprocess.run(["ip", "netns", "pids", host.space], check=True, capture_output=True, text=True).stdout
    found = []
    for pid in told.split():
        with suppress(psutil.NoSuchProcess):  # it may have ended since
            if psutil.Process(int(pid)).cmdline()[1:4] == ["-P", "-m", "octofold.launch.cli"]:
                found.append(psutil.Process(int(pid)))
    (agent,) = found
    return agent


@pytest.mark.parametrize("reached", [3], indirect=True)
def test_a_job_goes_on_without_a_host_whose_agent_is_killed(reached, tmp_path):
    """As the kernel does when memory is short: nobody starts it again, and the command ends as those that went on."""
    group, options = reached
    job = ["launch.min_nodes=2", "launch.rendezvous.lost_after_s=6", "launch.rendezvous.last_call_s=10"]
    job += ["launch.rendezvous.timeout_s=60", "train.global_batch_size=12", "parallel.expert=1"]
    # Three hosts of one busy machine have slow links at times.
    job += ["launch.preflight.stop_on_slow=false"]
    run_dir = tmp_path / "run"
    process = launch(group, options, tmp_path, *job, "checkpoint.every_steps=1", "train.steps=12")
    wait_for_step(run_dir, 3, [process])
    assert status_of(run_dir).standing_by == {}, "all three run ranks"
    agent_on(group[2]).kill()
    assert ended([process], LIMIT_S) == [0], outputs(tmp_path)
    assert max(losses(run_dir)) == 12
    assert status_of(run_dir).restarts == 1
    command = [sys.executable, "-m", "octofold.launch.cli", "status", str(run_dir)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"^state +done", told, re.M), told
    assert "node node2 (rank 2) not heard of for 6 s" in told
    assert "2 of launch.nodes=3 run ranks: node0, node1" in outputs(tmp_path)
