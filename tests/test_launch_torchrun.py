"""`octofold launch launch=torchrun`: commands that arrive as they were typed, and processes that end together."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.launch import ssh
from octofold.launch.cli import main
from octofold.launch.ssh import run_all
from octofold.launch.submission import HERE, Setting, Submission
from octofold.launch.torchrun import remote_script

JOB = [
    "model=tiny",
    "launch=torchrun",
    "launch.nodes=2",
    "launch.rendezvous.endpoint=node1:29400",
    "launch.dry_run=true",
]
SSH = ["launch.hosts=[node1,node2]", "launch.ssh.enabled=true", "launch.ssh.user=ada", "launch.ssh.options=[-p,2222]"]
HOSTILE = ["a b", "it's", '"', "$(touch /tmp/owned)", "`id`", "a\nb", "é 日本", "*", "~", "-x", "a;b", "a&b", "\\", "#"]
ECHO = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]


def test_a_dry_run_prints_the_command_of_a_node_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *JOB]) == 0
    printed = capsys.readouterr().out
    (command,) = [line for line in printed.splitlines() if line and not line.startswith("#")]
    note = "# to be run on each of 2 nodes"
    words = shlex.split(command)
    assert words[: len(HERE)] == list(HERE)
    assert words[len(HERE)] == "train"
    assert words[-2:] == ["launch.name=torchrun", "launch.dry_run=false"]
    (run_dir,) = [word for word in words if word.startswith("run_dir=")]
    assert run_dir.startswith(f'run_dir="{tmp_path}/runs/')
    assert not list(tmp_path.iterdir())
    assert note in printed


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {"GLOO_SOCKET_IFNAME": "INTERFACE", "OMP_NUM_THREADS": "CORES"}),
        (
            ["backend=cuda", "launch.nproc_per_node=8"],
            {"NCCL_SOCKET_IFNAME": "=INTERFACE", "OMP_NUM_THREADS": "CORES/8"},
        ),
        (["backend=ascend"], {"HCCL_WHITELIST_DISABLE": "1", "HCCL_EXEC_TIMEOUT": "600"}),
        (["launch.environment={GLOO_SOCKET_IFNAME:eth1,A_B:c d}"], {"GLOO_SOCKET_IFNAME": "eth1", "A_B": "c d"}),
    ],
)
def test_a_dry_run_lists_the_variables_that_nodes_set(more, expected, capsys):
    assert main(["launch", *JOB, "train.global_batch_size=64", *more]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#   ")]
    found = dict(re.split(" {2,}", line[4:])[0].split("=", 1) for line in listed)
    assert expected.items() <= found.items()
    assert all(len(re.split(" {2,}", line[4:])) == 2 for line in listed), "each has its reason"


@given(st.text(min_size=1), st.text(min_size=1))
def test_what_is_shown_of_values_folders_and_notes_stays_in_comments(typed, folder):
    """On a line of its own a shell would take it for a command."""
    shown = Submission({"file": "text\n"}, (("run", "it"),), (Setting("A", typed, "why"),), (typed,)).shown(
        Path(folder)
    )
    assert {line for line in shown.splitlines() if not line.startswith("#")} == {"", "text", "run it"}


def test_a_folder_that_ssh_would_not_expand_is_refused(capsys):
    assert main(["launch", *JOB, *SSH, "launch.ssh.directory='~/work'"]) == 2
    assert "an absolute path" in capsys.readouterr().err


def test_over_ssh_there_is_a_command_for_each_host(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *JOB, *SSH]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("ssh")]
    alive = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
    assert [command[:11] for command in commands] == [
        ["ssh", "-o", "BatchMode=yes", "-p", "2222", *alive, "--", f"ada@{host}"] for host in ("node1", "node2")
    ]
    assert commands[0][11] == commands[1][11]
    assert commands[0][11].startswith(f"cd {tmp_path} || exit 2")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["launch=local"], "octofold launch starts jobs of several machines"),
        (["launch.hosts=[a]"], "one name for each node"),
        (["launch.hosts=[a,a]"], "every node is a machine of its own"),
        (["launch.hosts=['-oProxyCommand',b]"], "names or addresses of machines"),
        (["launch.ssh.enabled=true"], "ssh needs names"),
        (["launch.hosts=[a,b]", "launch.ssh.user='a b'"], "a user's name"),
        (["launch.environment={A-B: x}"], "names of variables"),
        (["launch.nodes=0"], "at least one node"),
        (["launch.rendezvous.backend=etcd"], "one of c10d, static"),
        (["launch.preflight.slow_factor=1"], "a number above 1"),
        (["train.global_batch_size=3"], "train.global_batch_size=3"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_starts(more, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [text for text in JOB if text != "launch=torchrun" or "launch=local" not in more]
    assert main(["launch", *texts, *more]) == 2
    assert part in capsys.readouterr().err


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """What sshd does with a command: the user's shell reads it."""
    with subprocess.Popen(["sh", "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        process.communicate()
    return subprocess.CompletedProcess(script, process.returncode, said)


@pytest.mark.parametrize("folder", ["plain", *[name for name in HOSTILE if name != "~"]])
def test_hostile_names_arrive_unchanged_and_run_nothing(folder, tmp_path):
    place = tmp_path / folder.replace("/", "_")
    place.mkdir()
    done = shell(remote_script(str(place), [*ECHO, *HOSTILE]))
    assert (done.returncode, json.loads(done.stdout)) == (0, HOSTILE)
    assert not Path("/tmp/owned").exists()


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=3))
def test_any_text_arrives(words):
    script = shlex.join([sys.executable, "-c", "import os, sys; sys.stdout.write(ascii(sys.argv[1:]))", *words])
    assert shlex.split(remote_script("/", shlex.split(script)).partition(";")[0]) == ["cd", "/", "||", "exit", "2"]
    assert shlex.split(shlex.split(f"x {shlex.quote(script)}")[1])[3:] == words


def test_a_folder_that_is_not_there_ends_with_2():
    assert shell(remote_script("/nowhere", ECHO)).returncode == 2


def local(code: str) -> list[str]:
    """In place of ssh: a shell that reads the same script, here."""
    return ["sh", "-c", remote_script("/", [sys.executable, "-u", "-c", code])]


TRAP = (
    "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit(0))); print('up'); time.sleep(60)"
)


def test_one_host_that_fails_stops_the_others_by_sigterm(capfd):
    began_s = time.monotonic()
    status = run_all({"a": local(TRAP), "b": local("import time; time.sleep(2); raise SystemExit(1)")}, 5.0)
    assert status == 1
    assert time.monotonic() - began_s < 30
    assert "a: up\na: saved" in capfd.readouterr().out


def test_a_users_mistake_counts_before_what_it_led_to(capfd, tmp_path):
    # The first to end has the other stopped: it must have ended, too.
    mark = f"import pathlib, time; mark = pathlib.Path({str(tmp_path / 'mark')!r}); "
    first, then = "mark.touch(); raise SystemExit(2)", "[time.sleep(0.1) for _ in iter(mark.exists, True)]; "
    assert run_all({"a": local(mark + then + "raise SystemExit(1)"), "b": local(mark + first)}, 5.0) == 2
    assert run_all({"a": local("pass"), "b": local("pass")}, 5.0) == 0
    assert run_all({"a": local("raise SystemExit(255)")}, 5.0) == 1
    assert "ssh did not reach a, or lost it" in capfd.readouterr().err


def test_with_hosts_to_spare_the_first_one_decides():
    fails, ends, lasts = (local(text) for text in ("raise SystemExit(1)", "pass", "import time; time.sleep(2)"))
    assert run_all({"a": lasts, "b": fails, "c": ends}, 5.0, spare=2) == 0, "one is lost, one went early"
    assert run_all({"a": fails, "b": fails, "c": ends}, 5.0, spare=2) == 1, "too few failed to have stopped the job"


def test_a_spare_host_that_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ssh, "SPARE_S", 1.0)
    began_s = time.monotonic()
    silent = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
    assert run_all({"a": local("pass"), "b": local(silent)}, 1.0, spare=1) == 0
    assert time.monotonic() - began_s < 60


def test_a_signal_here_reaches_every_host(capfd):
    timer = threading.Timer(3.0, lambda: signal.raise_signal(signal.SIGTERM))
    timer.start()
    assert run_all({"a": local(TRAP), "b": local(TRAP)}, 5.0) == 0
    assert {"a: saved", "b: saved"} <= set(capfd.readouterr().out.splitlines())


def test_hosts_that_do_not_end_are_left_after_the_deadline(monkeypatch):
    monkeypatch.setattr("octofold.launch.ssh.SPARE_S", 1.0)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(8)"
    began_s = time.monotonic()
    assert run_all({"a": local(deaf), "b": local("raise SystemExit(1)")}, 0.5) == 1
    assert time.monotonic() - began_s < 6


def test_without_ssh_the_remedy_is_told():
    with pytest.raises(ValueError, match=r"launch\.ssh\.enabled=true reaches the hosts by ssh"):
        run_all({"a": ["/nowhere/ssh"]}, 1.0)
