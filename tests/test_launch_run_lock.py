"""One job a run folder, whatever way the job before it has ended."""

import os
import signal
import subprocess
import sys

import pytest

from octofold.backends.errors import UserError
from octofold.launch.run_lock import LOCK, locked

HOLDER = """
import sys, time
from pathlib import Path
from octofold.launch.run_lock import locked
with locked(Path(sys.argv[1])):
    import os
    if os.fork() == 0:
        time.sleep(60)  # a loader process, say, that outlives its parent
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path`, and a child of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == f"{process.pid}\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_second_job_is_refused_and_told_whose_the_folder_is(holder, tmp_path):
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    assert f"run_dir={tmp_path}" in str(error.value)
    assert f"process {holder.pid} on" in str(error.value)


def test_a_killed_job_leaves_the_folder_free_though_its_child_lives(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on")


def test_who_waits_gets_it_when_the_other_ends(holder, tmp_path):
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with locked(tmp_path, wait_s=30):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on")


def test_a_folder_is_free_again_after_a_job(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path):
        pass
