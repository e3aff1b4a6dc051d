"""The history of a run: every start and what changed, through torn lines and strangers."""

import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.train.history import HISTORY_FILE, append, read_history


def test_events_come_back_and_a_torn_line_swallows_none(tmp_path):
    append(tmp_path, "begin", ranks=2)
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write('{"event": "lo')
    append(tmp_path, "load", step=3, skipped=[{"path": "a", "reason": "b"}])
    (tmp_path / HISTORY_FILE).open("a").write("[]\n7\n")
    begin, load = read_history(tmp_path)
    assert (begin["event"], begin["ranks"]) == ("begin", 2)
    assert (load["step"], load["skipped"]) == (3, [{"path": "a", "reason": "b"}])
    assert {"time", "user", "host", "version"} <= load.keys()
    assert read_history(tmp_path / "nowhere") == []


def test_every_start_of_a_run_is_entered(ranks, tmp_path):
    root = write_corpus(tmp_path, documents=20)
    ranks(2).run(run_tasks.run, tiny_run(root, 2, parallel={"expert": 2}), tmp_path / "run", 2)
    run_tasks.alone(run_tasks.run, tiny_run(root, resume=str(tmp_path / "run")), tmp_path / "run")
    begin, load = read_history(tmp_path / "run")
    assert (begin["event"], begin["ranks"]) == ("begin", 2)
    assert (load["event"], load["ranks"], load["step"]) == ("load", 1, 2)
    assert load["checkpoint"] == str(tmp_path / "run" / "checkpoints" / "step_2")
