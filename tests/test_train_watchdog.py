"""The watchdog of one rank, with another's files beside it. Whole runs that hang: test_train_elastic.py."""

import json
import threading
import time

import pytest
import torch

from octofold.backends.flight import FlightRecorder
from octofold.train import watchdog as module
from octofold.train.checkpoint.folders import LocalOutput, LocalReader
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import CheckpointConfig
from octofold.train.stop import HANG_STATUS
from octofold.train.watchdog import LONGER, Watchdog, verdict

TIMEOUT_S = 0.4


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(module, "OTHERS_S", 0.2)


class Ended:
    """Stands for the end of the process."""

    def __init__(self):
        self.status = None
        self.event = threading.Event()

    def __call__(self, status):
        self.status = status
        self.event.set()


def make(logs, ended, *, ranks=1, timeout_s=TIMEOUT_S):
    return Watchdog(FlightRecorder(0), rank=0, ranks=ranks, timeout_s=timeout_s, logs=logs, end=ended)


def test_a_hang_is_broken_with_every_stack_written(tmp_path, capfd):
    ended = Ended()
    held = threading.Event()
    other = threading.Thread(target=held.wait, name="some-other-thread", daemon=True)
    other.start()
    with make(tmp_path, ended, ranks=2).watching(7) as _:
        assert ended.event.wait(30)
    held.set()
    assert ended.status == HANG_STATUS
    stacks = (tmp_path / "stacks_rank_0.txt").read_text()
    assert "test_a_hang_is_broken_with_every_stack_written" in stacks
    assert "thread some-other-thread:" in stacks
    text = (tmp_path / "hang.txt").read_text()
    assert text == "rank 1 gives no sign (stopped, or gone)\n"
    err = capfd.readouterr().err
    assert "(first step, after step 7); rank 1 gives no sign" in err
    assert str(tmp_path) in err


def test_steps_and_calls_count_as_signs(tmp_path):
    ended = Ended()
    watchdog = make(tmp_path, ended)
    with watchdog.watching(0):
        for step in range(12):
            watchdog.step_done(step)
            time.sleep(TIMEOUT_S / 4)
        for _ in range(12):
            watchdog.flight.moved_s = time.monotonic()
            time.sleep(TIMEOUT_S / 4)
        assert ended.status is None
        assert ended.event.wait(30), "and then nothing"


def test_the_first_step_and_saves_have_longer(tmp_path):
    watchdog = make(tmp_path, Ended())
    with watchdog.watching(0):
        assert watchdog.allowance_s == LONGER * TIMEOUT_S
        watchdog.step_done(1)
        assert watchdog.allowance_s == TIMEOUT_S
        with watchdog.longer("save"):
            assert watchdog.allowance_s == LONGER * TIMEOUT_S
        assert watchdog.allowance_s == TIMEOUT_S


def test_no_timeout_no_watch(tmp_path):
    before = threading.active_count()
    with make(tmp_path, Ended(), timeout_s=0.0).watching(0):
        assert threading.active_count() == before


def test_the_thread_ends_with_the_run(tmp_path):
    watchdog = make(tmp_path, Ended())
    with watchdog.watching(0):
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "octofold-watchdog"]
    thread.join(30)
    assert not thread.is_alive()


def test_an_old_report_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "hang_rank_0.json").write_text(json.dumps({"counts": {}, "recent": [], "at": "long ago"}))
    with make(tmp_path, Ended()).watching(0):
        assert not (tmp_path / "hang_rank_0.json").exists()


def test_logs_that_cannot_be_written_do_not_keep_it_from_ending(tmp_path, capfd):
    ended = Ended()
    (tmp_path / "file").write_text("")
    with make(tmp_path / "file" / "logs", ended).watching(0):
        assert ended.event.wait(30)
    assert ended.status == HANG_STATUS
    err = capfd.readouterr().err
    assert "not written to" in err
    assert "rank 0: test_train_watchdog.py" in err


def test_a_process_that_was_stopped_and_goes_on_is_no_hang(tmp_path, monkeypatch):
    """Its watchdog finds that it has not run either."""
    ended, clock = Ended(), [1000.0]
    watchdog = make(tmp_path, ended, timeout_s=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    watchdog._moved_s = watchdog.flight.moved_s = 1000.0
    left = iter([3600.0, 5.0, 5.0])

    def wait(_poll_s):
        step = next(left, None)
        clock[0] += step or 0.0
        return step is None

    monkeypatch.setattr(watchdog._left, "wait", wait)
    watchdog.step_done(1)
    watchdog._watch()
    assert ended.status is None


def test_what_is_said_of_ranks_in_a_circle():
    waiting = {"channel": "a", "count": 1, "ranks": [0, 1], "text": "barrier() on a [0, 1]", "done": False}
    reports = {
        0: {"counts": {"a": 1}, "recent": [waiting], "at": "x.py:1 in f"},
        1: {"counts": {"b": 1}, "recent": [{**waiting, "channel": "b"}], "at": "y.py:2 in g"},
    }
    assert verdict(reports, range(2)) == (
        "ranks wait for one another in a circle:\n"
        "  rank 0 for rank 1 in barrier() on a [0, 1]\n"
        "  rank 1 for rank 0 in barrier() on a [0, 1]"
    )


def test_what_is_said_where_nobody_is_missing():
    reports = {rank: {"counts": {}, "recent": [], "at": f"x.py:{rank} in f"} for rank in (0, 1)}
    assert verdict(reports, range(2)).splitlines()[1:] == ["  rank 0: x.py:0 in f", "  rank 1: x.py:1 in f"]


def slow_disk(monkeypatch, pause):
    """A disk that calls `pause` for each block of 64 bytes, written or read."""
    write, read = LocalOutput.write, LocalReader.read_into
    for name in ("checksums", "writing"):
        monkeypatch.setattr(f"octofold.train.checkpoint.{name}.BLOCK_BYTES", 64)
    monkeypatch.setattr(LocalOutput, "write", lambda *given: (pause(), write(*given))[1])
    monkeypatch.setattr(LocalReader, "read_into", lambda *given: (pause(), read(*given))[1])


def test_a_slow_save_and_a_slow_load_are_no_hangs(tmp_path, monkeypatch, world_of_one):
    ended = Ended()
    watchdog = make(tmp_path, ended)
    slow_disk(monkeypatch, lambda: time.sleep(TIMEOUT_S / 2))
    tensors = {"model.a": torch.arange(200.0)}
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), torch.device("cpu"), alive=watchdog.sign)
    with watchdog.watching(0):
        began_s = time.monotonic()
        checkpointer.save(1, tensors, {"step": 1})
        checkpointer.wait()
        saved_s = time.monotonic()
        checkpointer.load(tmp_path, tensors)
        loaded_s = time.monotonic()
    assert min(saved_s - began_s, loaded_s - saved_s) > 1.2 * LONGER * TIMEOUT_S
    assert ended.status is None


def test_a_disk_that_takes_nothing_any_more_is_a_hang(tmp_path, monkeypatch, world_of_one):
    ended, held = Ended(), threading.Event()
    watchdog = make(tmp_path, ended)
    slow_disk(monkeypatch, held.wait)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), torch.device("cpu"), alive=watchdog.sign)
    with watchdog.watching(0):
        checkpointer.save(1, {"model.a": torch.arange(200.0)}, {"step": 1})
        waiting = threading.Thread(target=checkpointer.wait)
        waiting.start()
        assert ended.event.wait(30)
    assert "in write" in (tmp_path / "stacks_rank_0.txt").read_text()
    held.set()
    waiting.join()
    assert ended.status == HANG_STATUS
