"""The agents of several hosts over ssh: their output here, each line with its host, and one end for all."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

from octofold.backends.errors import UserError

POLL_S = 0.1
SPARE_S = 15.0
"""What agents may take, beyond their ranks' deadline, to end after their input has."""
SSH_FAILED = 255
"""ssh's own exit status where it did not reach the host, or lost it."""


def run_all(commands: Mapping[str, Sequence[str]], stop_deadline_s: float, spare: int = 0) -> int:
    """Run one command a host until all have ended; returns the status of the job.

    When more than `spare` end with a failure, or a signal comes, the others' inputs are closed, which they take for
    SIGTERM.

    Args:
        commands: host -> ssh with its arguments, first that of the host where all meet.
        stop_deadline_s: that ranks take to save.
        spare: how many hosts the job can do without.

    Raises:
        UserError: ssh is not here.
    """
    started: dict[str, subprocess.Popen[bytes]] = {}
    threads = []
    stopped: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        stopped.append(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        for host, command in commands.items():
            started[host] = _start(command)
            threads.append(threading.Thread(target=_copy, args=(host, started[host]), daemon=True))
            threads[-1].start()
        _wait(started, stopped, stop_deadline_s, spare)
    finally:
        for process in started.values():
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.join(SPARE_S)
    return _status({host: process.wait() for host, process in started.items()}, stopped, spare)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: a terminal's Ctrl-C goes to this process, which tells the hosts.
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        rule = "launch.ssh.enabled=true reaches the hosts by ssh"
        raise UserError(
            f"{command[0]} is not here\n  rule:   {rule}\n  remedy: install it, or start each host by hand"
        ) from error


def _copy(host: str, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        # In one call, so that lines of several hosts do not mix.
        sys.stdout.buffer.write(f"{host}: ".encode() + line)
        sys.stdout.flush()


def _wait(
    started: Mapping[str, "subprocess.Popen[bytes]"], stopped: list[int], stop_deadline_s: float, spare: int
) -> None:
    closed_s: float | None = None
    while any(process.poll() is None for process in started.values()):
        statuses = [process.poll() for process in started.values()]
        # At the first host all meet: when it is done so is the job, though a host whose link is cut says nothing.
        done = spare > 0 and statuses[0] == 0
        if closed_s is None and (stopped or sum(map(bool, statuses)) > spare or done):
            closed_s = time.monotonic()
            for process in started.values():
                assert process.stdin is not None
                with suppress(OSError):
                    process.stdin.close()
        if closed_s is not None and time.monotonic() - closed_s > stop_deadline_s + SPARE_S:
            return
        time.sleep(POLL_S)


def _status(statuses: Mapping[str, int], stopped: Sequence[int], spare: int) -> int:
    for host, status in statuses.items():
        if status == SSH_FAILED:
            print(f"octofold: ssh did not reach {host}, or lost it; its own message is above", file=sys.stderr)
    if stopped and not any(statuses.values()):
        return 0 if stopped[0] != signal.SIGINT else 128 + stopped[0]
    worst = [status for status in statuses.values() if status]
    if spare and not next(iter(statuses.values())):
        # It leads, and has ended well: the job could do without those that did not.
        return 0
    # The user's mistake, which every agent ends with, counts before what it led to.
    return 2 if 2 in worst else 1 if worst else 0
