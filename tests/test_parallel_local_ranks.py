"""Warm ranks: results in order, failures told with the rank and its traceback, no process left behind."""

import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import rank_tasks
import torch.distributed as dist

from octofold.parallel.local_ranks import LocalRanks, RankError


@pytest.fixture(scope="module", params=[(), ("octofold.parallel.local_ranks",)], ids=["fresh", "forked"])
def pair(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    """Two ranks of this module's own, since its tests end them."""
    with LocalRanks(2, request.param) as started:
        yield started


def pids_of(started: LocalRanks) -> list[int]:
    return [pid for _, _, pid, _ in started.run(rank_tasks.whoami)]


def wait_until_gone(pids: list[int], timeout_s: float = 8.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]:
        assert time.monotonic() < deadline_s, f"still alive: {alive}"
        time.sleep(0.05)


def test_results_come_in_rank_order_from_warm_processes(ranks):
    first = ranks(2).run(rank_tasks.whoami, "text", {"n": 1})
    assert [(rank, world, args) for rank, world, _, args in first] == [(r, 2, ("text", {"n": 1})) for r in range(2)]
    second = ranks(2).run("rank_tasks:whoami")
    assert [pid for _, _, pid, _ in second] == [pid for _, _, pid, _ in first]
    assert ranks(2) is ranks(2)
    assert not dist.is_initialized()


def test_an_exception_is_told_and_the_next_run_starts_fresh(pair):
    before = pids_of(pair)
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed in rank_tasks:fail_on.*fail_on.*KeyError.*offender"):
        pair.run(rank_tasks.fail_on, 1)
    wait_until_gone(before)
    assert not set(before) & set(pids_of(pair))


def test_a_died_rank_is_told_and_ends_the_others(pair):
    before = pids_of(pair)
    with pytest.raises(RankError, match=r"^rank 0 of 2 died of SIGKILL during rank_tasks:die_on"):
        pair.run(rank_tasks.die_on, 0, signal.SIGKILL)
    wait_until_gone(before)


def test_a_hang_ends_all_processes(pair, capfd):
    before = pids_of(pair)
    with pytest.raises(RankError, match=r"rank\(s\) \[1\] of 2 gave no result of rank_tasks:hang_on within timeout_s="):
        pair.run(rank_tasks.hang_on, 1, timeout_s=0.5)
    assert "in hang_on" in capfd.readouterr().err
    wait_until_gone(before)


def test_what_cannot_be_called_or_sent_back():
    with LocalRanks(1) as one:
        with pytest.raises(RankError, match=r"rank 0 of 1 failed in rank_tasks:unpicklable"):
            one.run(rank_tasks.unpicklable)
        with pytest.raises(RankError, match=r"(?s)failed in rank_tasks:exit_politely.*SystemExit: enough"):
            one.run(rank_tasks.exit_politely)
        with pytest.raises(RankError, match=r"(?s)failed in no_such_module:f.*ModuleNotFoundError"):
            one.run("no_such_module:f")


def test_an_exit_and_a_death_while_idle():
    with LocalRanks(1) as one:
        with pytest.raises(RankError, match=r"rank 0 of 1 died with exit status 3"):
            one.run(rank_tasks.die_on, 0, None)
        (pid,) = pids_of(one)
        psutil.Process(pid).kill()
        while pid in {child.pid for child in multiprocessing.active_children()}:
            time.sleep(0.05)
        assert pids_of(one) != [pid], "a rank that died while idle is replaced"


def test_an_argument_that_cannot_travel_leaves_the_ranks_alone(ranks):
    before = pids_of(ranks(2))
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        ranks(2).run(rank_tasks.whoami, lambda: None)
    assert pids_of(ranks(2)) == before


def test_close_leaves_no_process():
    started = LocalRanks(1)
    pids = pids_of(started)
    started.close()
    assert not any(map(psutil.pid_exists, pids))
    started.close()


ORPHANS = """
import sys
import rank_tasks
from octofold.parallel.local_ranks import LocalRanks

if __name__ == "__main__":
    ranks = LocalRanks(2)
    print(*(pid for _, _, pid, _ in ranks.run(rank_tasks.whoami)), flush=True)
    ranks.run(rank_tasks.hang_on, 0)
"""


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    """One rank is inside a call then and the other idle."""
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    wait_until_gone(pids)
