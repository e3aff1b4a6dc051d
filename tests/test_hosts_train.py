"""Jobs over several hosts: each with its agent, in a network namespace of its own."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hosts import TRAIN, WHY_NOT, Host, ended, hosts

from octofold.launch.status import status_of

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(300),
]
# The quickstart's data and precision, and a model of its kind that is a few seconds' work.
JOB = [
    *("experiment=quickstart", "model.num_hidden_layers=2", "model.n_routed_experts=8", "parallel.expert=2"),
    *("train.global_batch_size=8", "train.micro_batch_size=2", "data.sequence_length=64", "train.log_every=1"),
    *("train.eval_sequences=4", "train.final_eval_sequences=4", "train.sample_tokens=0", "backend.threads=1"),
    "optim.warmup_steps=2",
]
FP8 = 2e-3
"""What the order of sums does to a loss within four steps in emulated FP8: hosts that lie otherwise, sum otherwise."""
SMALL = ["model=tiny", "precision=fp32", "data.tokenizer=bytes"]
"""Over `JOB`, for what does not look at losses."""
STATIC = ["launch.rendezvous.backend=static"]
LIMIT_S = 150.0


def node_command(count: int, ranks: int, run_dir: Path, *more: str, steps: int = 4, small: bool = True) -> list[str]:
    """Of each of `count` hosts, the first of which is node0."""
    meeting = [f"launch.nodes={count}", "launch.rendezvous.endpoint=node0:29407", "launch.rendezvous.timeout_s=60"]
    job = [
        *JOB,
        *(SMALL if small else []),
        f"train.steps={steps}",
        f"run_dir={run_dir}",
        f"launch.nproc_per_node={ranks}",
    ]
    return [*TRAIN, *job, "launch=torchrun", *meeting, *more]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, of the attempt that counts."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def outputs(folder: Path) -> str:
    """All that the hosts printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.out")))


def run_on(
    group: list[Host], ranks: int, folder: Path, *more: str, steps: int = 4, small: bool = True
) -> list[subprocess.Popen[str]]:
    """The job's agents, one started on each host."""
    command = node_command(len(group), ranks, folder / "run", *more, steps=steps, small=small)
    return [host.start(command, folder / f"{host.name}.out") for host in group]


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Return once a step has been taken; fail where a process ends before."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        assert all(process.poll() is None for process in processes), outputs(run_dir.parent)
        if (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"step {step}")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Return once it holds."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def agent(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that a host's own init would signal: nsenter has become it, or is its parent."""
    outer = psutil.Process(process.pid)
    inner = [child for child in outer.children() if "octofold.launch.cli" in child.cmdline()]
    return inner[0] if "nsenter" in outer.name() and inner else outer


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> dict[int, float]:
    """Losses of the job on one host with four ranks."""
    folder = tmp_path_factory.mktemp("one")
    run_dir = folder / "run"
    command = [*TRAIN, *JOB, "train.steps=4", f"run_dir={run_dir}", "launch.nproc_per_node=4"]
    subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True)
    return losses(run_dir)


@pytest.mark.parametrize(
    ("count", "ranks", "more"),
    [(2, 2, []), pytest.param(4, 1, STATIC, marks=pytest.mark.slow)],
)
def test_hosts_train_to_the_losses_of_one(count, ranks, more, one_host, tmp_path):
    with hosts(count, tmp_path) as group:
        if more:
            more = [*more, f"launch.hosts=[{','.join(host.name for host in group)}]"]
        processes = run_on(group, ranks, tmp_path, *more, small=False)
        assert ended(processes, LIMIT_S) == [0] * count, outputs(tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(one_host, rel=FP8)
    logs = tmp_path / "run" / "logs"
    assert [(logs / f"rank_{rank}.log").exists() for rank in range(4)] == [True] * 4
    told = [("step " in path.read_text()) for path in sorted(tmp_path.glob("*.out"))]
    assert sum(told) == 1, "rank 0 alone is on a console"


@pytest.mark.slow
def test_a_rank_that_dies_is_named_with_its_host_and_all_go_on(tmp_path):
    with hosts(2, tmp_path) as group:
        processes = run_on(
            group, 1, tmp_path, "checkpoint.every_steps=1", "launch.rendezvous.lost_after_s=10", steps=12
        )
        wait_for_step(tmp_path / "run", 3, processes)
        victims = subprocess.run(["pgrep", "-f", f"launch.worker {tmp_path}"], capture_output=True, text=True).stdout
        spaces = {pid: Path(f"/proc/{pid}/environ").read_text().partition("\0RANK=")[2][:1] for pid in victims.split()}
        (victim,) = [pid for pid, rank in spaces.items() if rank == "1"]
        subprocess.run(["kill", "-9", victim], check=True)
        assert ended(processes, LIMIT_S) == [0, 0], outputs(tmp_path)
    said = outputs(tmp_path)
    assert said.count("restart 1 of launch.max_restarts=3") == 2, "each node says so"
    assert "node node1: rank 1 died of SIGKILL" in said
    assert max(losses(tmp_path / "run")) == 12


@pytest.mark.slow
def test_a_host_whose_link_is_cut_is_named_within_the_time(tmp_path):
    with hosts(2, tmp_path) as group:
        times = ["launch.rendezvous.lost_after_s=6", "launch.rendezvous.timeout_s=10"]
        processes = run_on(group, 1, tmp_path, *times, "checkpoint.every_steps=1", steps=4000)
        wait_for_step(tmp_path / "run", 2, processes)
        group[1].cut()
        began_s = time.monotonic()
        assert ended(processes, 120) == [1, 1], outputs(tmp_path)
        assert time.monotonic() - began_s < 90
    first, second = [(tmp_path / f"{host}.out").read_text(errors="replace") for host in ("node0", "node1")]
    assert "node node1 (rank 1) not heard of for 6 s" in first
    assert "1 of launch.nodes=2 came: node0; missing: node1" in first
    assert "not been heard of for 6 s" in second


@pytest.mark.slow
@pytest.mark.parametrize("meet_at", [0, 1])
def test_a_host_that_is_lost_may_come_back(meet_at, tmp_path):
    """Torch numbers nodes by their addresses: the one that comes back sorts before the one that leads, or after."""
    with hosts(2, tmp_path) as group:
        times = ["launch.rendezvous.lost_after_s=6", "launch.rendezvous.timeout_s=60"]
        job = [*times, "checkpoint.every_steps=1", f"launch.rendezvous.endpoint=node{meet_at}:29407"]
        processes = run_on(group, 1, tmp_path, *job, steps=10)
        wait_for_step(tmp_path / "run", 3, processes)
        lost = 1 - meet_at
        group[lost].kill()
        time.sleep(1.0)
        again = group[lost].start(node_command(2, 1, tmp_path / "run", *job, steps=10), tmp_path / "again.out")
        assert ended([processes[meet_at], again], LIMIT_S) == [0, 0], outputs(tmp_path)
    assert f"node node{lost} (rank 1) not heard of for 6 s" in outputs(tmp_path)
    assert (tmp_path / f"node{meet_at}.out").read_text().count("restart 1 of launch.max_restarts=3") == 1
    assert max(losses(tmp_path / "run")) == 10


@pytest.mark.slow
def test_the_first_host_that_dies_is_named(tmp_path):
    with hosts(2, tmp_path) as group:
        processes = run_on(group, 1, tmp_path, "launch.rendezvous.lost_after_s=6", steps=4000)
        wait_for_step(tmp_path / "run", 2, processes)
        group[0].kill()
        assert ended(processes[1:], 60) == [1], outputs(tmp_path)
    assert "node node0, which leads, has not been heard of for 6 s" in (tmp_path / "node1.out").read_text()


@pytest.mark.slow
def test_a_host_may_come_late_or_never(tmp_path):
    with hosts(2, tmp_path) as group:
        command = node_command(2, 1, tmp_path / "run", steps=2)
        late = group[1].start(command, tmp_path / "node1.out")
        time.sleep(8.0)
        first = group[0].start(command, tmp_path / "node0.out")
        assert ended([first, late], LIMIT_S) == [0, 0], outputs(tmp_path)
        waiting = [text for text in node_command(2, 1, tmp_path / "never") if "timeout_s" not in text]
        limits = ["launch.rendezvous.timeout_s=5", "launch.hosts=[node0,node1]"]
        alone = group[0].start([*waiting, *limits], tmp_path / "alone.out")
        lonely = group[1].start([*waiting, *limits, "launch.rendezvous.endpoint=node0:29408"], tmp_path / "lonely.out")
        assert ended([alone, lonely], 60) == [1, 1]
    assert "1 of launch.nodes=2 came: node0; missing: node1" in (tmp_path / "alone.out").read_text()
    said = (tmp_path / "lonely.out").read_text()
    assert "node0:29408" in said
    assert "for 5 s (launch.rendezvous.timeout_s) nobody answered" in said


def listeners(space: str) -> list[tuple[int, str]]:
    """Port and process, by its command, of all that listens on a host for others."""
    told = subprocess.run(
        ["ip", "netns", "exec", space, "ss", "-Htlnp"], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for line in told.splitlines():
        where, pid = line.split()[3], re.search(r"pid=(\d+)", line)
        assert pid, line
        with suppress(psutil.NoSuchProcess):
            found.append((int(where.rpartition(":")[2]), " ".join(psutil.Process(int(pid[1])).cmdline())))
    return found


@pytest.mark.skipif(shutil.which("ss") is None, reason="ss (iproute2) is not installed")
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_all_that_hosts_open_for_each_other_lies_in_the_ports_they_were_given(backend, tmp_path):
    """Ours in launch.ports, though one of them is taken; gloo's where net.ipv4.ip_local_port_range says."""
    program = "import socket, time; s = socket.create_server(('', 29463)); print('up', flush=True); time.sleep(600)"
    with hosts(2, tmp_path) as group:
        for host in group:
            limits = ["sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=41000 41999"]
            assert host.start(limits, tmp_path / f"{host.name}.sysctl").wait(20) == 0
        group[0].start(["python3", "-c", program], tmp_path / "holder.log")
        wait_for(lambda: "up" in (tmp_path / "holder.log").read_text(), 20)
        command = [
            text for text in node_command(2, 2, tmp_path / "run", steps=4000) if "rendezvous.endpoint" not in text
        ]
        command += ["launch.ports=29400-29463", "launch.hosts=[node0,node1]", f"launch.rendezvous.backend={backend}"]
        processes = [host.start(command, tmp_path / f"{host.name}.out") for host in group]
        wait_for_step(tmp_path / "run", 2, processes)
        seen = [listeners(host.space) for host in group]
        agent(processes[1]).send_signal(signal.SIGTERM)
        assert ended(processes, LIMIT_S) == [0, 0], outputs(tmp_path)
    agents = [sorted(port for port, name in found if "octofold.launch.cli" in name) for found in seen]
    assert agents == [[29400, 29462] if backend == "c10d" else [29400], []], seen
    ranks = {port for found in seen for port, name in found if "octofold.launch.worker" in name}
    assert ranks
    assert ranks <= set(range(41000, 42000)), seen


def test_a_taken_port_and_a_name_without_address_are_named(tmp_path):
    with hosts(2, tmp_path) as group:
        program = "import socket, time; s = socket.create_server(('', 29407)); print('up', flush=True); time.sleep(600)"
        group[0].start(["python3", "-c", program], tmp_path / "holder.out")
        deadline_s = time.monotonic() + 20
        while "up" not in (tmp_path / "holder.out").read_text() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        taken = group[0].start(node_command(2, 1, tmp_path / "run"), tmp_path / "node0.out")
        unknown = ["launch.rendezvous.endpoint=nowhere.invalid:29407", "launch.rendezvous.timeout_s=2"]
        stray = group[1].start([*node_command(2, 1, tmp_path / "run"), *unknown], tmp_path / "node1.out")
        assert ended([taken, stray], 60) == [2, 2], outputs(tmp_path)
    assert (
        "node0:29407\n  rule:   the first node listens there: another process holds the port"
        in (tmp_path / "node0.out").read_text()
    )
    assert (
        "nowhere.invalid:29407\n  rule:   nodes meet there, and the name has no address"
        in (tmp_path / "node1.out").read_text()
    )


def test_nodes_that_were_given_different_jobs_are_named(tmp_path):
    with hosts(2, tmp_path) as group:
        command = node_command(2, 1, tmp_path / "run")
        processes = [
            group[0].start(command, tmp_path / "node0.out"),
            group[1].start([*command, "optim.lr=0.5"], tmp_path / "node1.out"),
        ]
        assert ended(processes, 90) == [2, 2], outputs(tmp_path)
    for host in group:
        said = (tmp_path / f"{host.name}.out").read_text()
        assert "nodes differ in configuration: node0 " in said
        assert "every node has the same versions and composes the same job" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_node_that_the_doctor_finds_unfit_is_named(tmp_path):
    with hosts(2, tmp_path) as group:
        command = node_command(2, 1, tmp_path / "run")
        processes = [
            group[0].start(command, tmp_path / "node0.out"),
            group[1].start(command, tmp_path / "node1.out", GLOO_SOCKET_IFNAME="eth77"),
        ]
        assert ended(processes, 120) == [2, 2], outputs(tmp_path)
    for host in group:
        said = (tmp_path / f"{host.name}.out").read_text()
        assert "node1: interfaces: GLOO_SOCKET_IFNAME=eth77 matches no interface of this machine" in said


@pytest.mark.slow
def test_a_host_with_a_slow_link_is_named(tmp_path):
    with hosts(3, tmp_path) as group:
        group[2].slow("20mbit")
        more = ["launch.preflight.message_mib=1", "train.global_batch_size=6", "parallel.expert=1"]
        processes = run_on(group, 1, tmp_path, *more, "launch.preflight.doctor=false")
        assert ended(processes, LIMIT_S) == [2] * 3, outputs(tmp_path)
    assert re.search(r"slow: node2 \([\d.]+ times the usual\)", outputs(tmp_path))


@pytest.mark.slow
def test_a_job_goes_on_without_a_host_that_is_lost(tmp_path):
    """Of three hosts the batch can be divided among two: the third takes the place of the one that dies."""
    with hosts(3, tmp_path) as group:
        times = ["launch.rendezvous.lost_after_s=6", "launch.rendezvous.last_call_s=10", "launch.min_nodes=1"]
        processes = run_on(group, 1, tmp_path, *times, "checkpoint.every_steps=1", steps=12)
        wait_for_step(tmp_path / "run", 3, processes)
        said = outputs(tmp_path)
        assert "2 of launch.nodes=3 run ranks: node0, node1" in said
        assert "this node stands by: the layout uses 2 of the nodes that are fit" in said
        group[1].kill()
        assert ended([processes[0], processes[2]], LIMIT_S) == [0, 0], outputs(tmp_path)
    said = outputs(tmp_path)
    assert "node node1 (rank 1) not heard of for 6 s" in said
    assert "2 of launch.nodes=3 run ranks: node0, node2" in said
    assert max(losses(tmp_path / "run")) == 12
    assert status_of(tmp_path / "run").restarts == 1


@pytest.mark.slow
def test_a_host_that_stands_by_may_go_and_one_that_comes_is_taken_in(tmp_path):
    with hosts(3, tmp_path) as group:
        times = ["launch.rendezvous.lost_after_s=6", "launch.rendezvous.last_call_s=5", "launch.min_nodes=2"]
        times += ["launch.rendezvous.timeout_s=10", "checkpoint.every_steps=20"]
        processes = run_on(group, 1, tmp_path, *times, steps=400)
        wait_for_step(tmp_path / "run", 2, processes)
        agent(processes[2]).send_signal(signal.SIGTERM)
        assert ended(processes[2:], 30) == [0], outputs(tmp_path)
        late = group[2].start(node_command(3, 1, tmp_path / "run", *times, steps=400), tmp_path / "late.out")
        wait_for(lambda: "the job runs without this node" in (tmp_path / "late.out").read_text(), 60)
        # What goes wrong on those that run is mended as before, with the one that has come.
        victim = [child for child in agent(processes[1]).children() if "octofold.launch.worker" in child.cmdline()]
        victim[0].kill()
        assert ended([*processes[:2], late], LIMIT_S) == [0, 0, 0], outputs(tmp_path)
    said = outputs(tmp_path)
    assert said.count("restart 1 of launch.max_restarts=3") == 2
    assert "this node stands by" in (tmp_path / "late.out").read_text()
    assert max(losses(tmp_path / "run")) == 400


@pytest.mark.slow
def test_a_signal_to_the_host_that_leads_and_stands_by_has_all_save(tmp_path):
    with hosts(2, tmp_path) as group:
        times = ["launch.rendezvous.last_call_s=10", "launch.min_nodes=1", "parallel.expert=1"]
        command = node_command(2, 1, tmp_path / "run", *times, steps=4000)
        processes = [
            group[0].start(command, tmp_path / "node0.out", GLOO_SOCKET_IFNAME="eth77"),
            group[1].start(command, tmp_path / "node1.out"),
        ]
        wait_for_step(tmp_path / "run", 2, processes)
        agent(processes[0]).send_signal(signal.SIGTERM)
        assert ended(processes, 60) == [0, 0], outputs(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))
    assert status_of(tmp_path / "run").state == "stopped"


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_ranks(tmp_path):
    with hosts(2, tmp_path) as group:
        times = ["launch.rendezvous.lost_after_s=6", "launch.rendezvous.last_call_s=5", "launch.min_nodes=1"]
        job = [*times, "checkpoint.every_steps=1", "parallel.expert=1"]
        processes = run_on(group, 1, tmp_path, *job, steps=12)
        wait_for_step(tmp_path / "run", 3, processes)
        group[1].kill()
        assert ended(processes[:1], LIMIT_S) == [0], outputs(tmp_path)
        # Nobody is lost, and the course is the same within rounding.
        whole = group[1].start(node_command(1, 1, tmp_path / "whole", *job[3:], steps=12), tmp_path / "whole.log")
        assert whole.wait(LIMIT_S) == 0
    assert "1 of launch.nodes=2 run ranks: node0" in outputs(tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.slow
def test_a_job_begins_without_an_unfit_host(tmp_path):
    """Even where it is the one that leads, and at which nodes meet."""
    with hosts(2, tmp_path) as group:
        times = ["launch.rendezvous.last_call_s=10", "launch.min_nodes=1", "parallel.expert=1"]
        command = node_command(2, 1, tmp_path / "run", *times)
        processes = [
            group[0].start(command, tmp_path / "node0.out", GLOO_SOCKET_IFNAME="eth77"),
            group[1].start(command, tmp_path / "node1.out"),
        ]
        assert ended(processes, 120) == [0, 0], outputs(tmp_path)
    assert "this node stands by: interfaces: GLOO_SOCKET_IFNAME=eth77" in (tmp_path / "node0.out").read_text()
    assert "step 4/4" in (tmp_path / "node1.out").read_text()
    assert list(status_of(tmp_path / "run").standing_by) == ["node0"]


@pytest.mark.slow
def test_a_job_begins_again_without_a_slow_host(tmp_path):
    with hosts(3, tmp_path) as group:
        group[2].slow("20mbit")
        more = ["launch.preflight.message_mib=1", "train.global_batch_size=12", "parallel.expert=1"]
        less = ["launch.min_nodes=2", "launch.rendezvous.last_call_s=30", "launch.max_restarts=0"]
        processes = run_on(group, 1, tmp_path, *more, *less, "launch.preflight.doctor=false")
        assert ended(processes, LIMIT_S) == [0] * 3, outputs(tmp_path)
    said = outputs(tmp_path)
    assert "begins again without node2" in said
    assert "this node stands by: its links are slow" in (tmp_path / "node2.out").read_text()
    assert max(losses(tmp_path / "run")) == 4
    assert status_of(tmp_path / "run").restarts == 0
