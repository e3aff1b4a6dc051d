"""Tab completion, asked as the shell asks."""

import os
import shutil
import subprocess

import pytest

from octofold.backends.errors import UserError
from octofold.launch.cli import VERBS
from octofold.launch.completion import complete


@pytest.fixture
def ask(monkeypatch, capsys):
    """The words offered for a line whose cursor stands at its end, or at `point`."""

    def words(line, point=None):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line) if point is None else point))
        complete("query=bash", list(VERBS))
        return capsys.readouterr().out.split()

    return words


def test_verbs_come_first(ask):
    assert ask("octofold ") == [
        "train",
        "launch",
        "sample",
        "status",
        "report",
        "inspect",
        "trace",
        "verify",
        "import",
        "export",
        "doctor",
        "rank-table",
    ]
    assert ask("/some/bin/octofold re") == ["report"]
    assert ask("octofold train", point=13) == ["train"]


def test_after_train_come_groups_and_keys(ask):
    offered = ask("octofold train ")
    assert {"model=", "experiment=", "train.", "run_dir="} <= set(offered)
    assert not [word for word in offered if word.startswith("hydra")]
    assert {"model=deepseek_v3", "model=moe_10m", "model=tiny"} <= set(ask("octofold train model="))
    assert ask("octofold  train  experiment=q") == ["experiment=quickstart"]
    assert "train.steps=" in ask("octofold train train.st")


def test_earlier_words_count_and_quotes_do_no_harm(ask):
    assert ask("octofold train experiment=quickstart train.steps=") == ["train.steps=600"]
    assert ask("octofold train data.path='a b' model=t") == ["model=tiny"]
    assert ask('octofold train data.path="a') == []
    assert ask("octofold train model=tinny train.ste") == []


def test_other_verbs_leave_the_shell_to_offer_files(ask):
    assert ask("octofold report ") == []


@pytest.mark.parametrize("request_", ["", "install=tcsh", "list=bash", "query"])
def test_a_request_of_another_form_is_refused(request_):
    with pytest.raises(UserError, match="remedy"):
        complete(request_, list(VERBS))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_itself_completes(console_script, tmp_path):
    script = """
eval "$(octofold -sc install=bash)"
COMP_LINE='octofold train experiment=qu'; COMP_POINT=${#COMP_LINE}; COMP_CWORD=2
COMP_WORDS=($COMP_LINE)
hydra_bash_completion
echo "offered: ${COMPREPLY[@]}"
"""
    env = {**os.environ, "PATH": f"{console_script.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "offered: experiment=quickstart" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def console_script():
    """The installed `octofold` command."""
    import sys
    from pathlib import Path

    return Path(sys.executable).with_name("octofold")
