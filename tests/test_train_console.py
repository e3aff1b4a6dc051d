"""What a person sees: plain lines in a pipe, a live bar on a terminal, and nothing that can crash a run."""

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.train.console import Console, printable, verdict

RECORD = {
    "kind": "train",
    "step": 120,
    "loss": 2.3451,
    "lr": 1.9e-3,
    "grad_norm": 0.42,
    "imbalance": 1.31,
    "tokens_per_s": 5432.4,
}
FINAL = {
    "kind": "final",
    "step": 600,
    "validation_loss": 1.7,
    "validation_loss_per_byte": 1.7,
    "baselines": {"unigram": 3.26, "bigram": 2.48, "trigram": 1.85},
    "sample": "def [bold]f[/bold](x):\n\treturn x\x1b[2J",
    "train_s": 300.0,
}


def final_text(record: dict, run_dir: Path = Path("runs/my run"), checkpoint: Path | None = None) -> str:
    stream = io.StringIO()
    Console(stream=stream).final(record, run_dir=run_dir, checkpoint=checkpoint)
    return stream.getvalue()


def test_a_pipe_gets_one_plain_line_an_update():
    stream = io.StringIO()
    with Console(stream=stream).progress(600, 0) as progress:
        progress.update(RECORD)
        progress.update({**RECORD, "step": 130})
    first, second = stream.getvalue().splitlines()
    line = "step 120/600  loss 2.345  lr 1.9e-03  grad norm 0.42  imbalance 1.31  5,432 tokens/s  left "
    assert re.fullmatch(re.escape(line) + r"\d+:\d\d", first)
    assert second.startswith("step 130/600")


def test_force_color_does_not_bring_a_live_bar_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(stream=stream).progress(600, 0) as progress:
        progress.update(RECORD)
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds_a_step", "expected"), [(0.525, "4:12"), (8, "1:04:00"), (0.0, "0:00"), (math.inf, "?")]
)
def test_time_left_follows_the_clock(monkeypatch, seconds_a_step, expected):
    clock = iter([0.0, seconds_a_step * 120])
    monkeypatch.setattr("octofold.train.console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Console(stream=stream).progress(600, 0) as progress:
        progress.update(RECORD)
    assert stream.getvalue().rstrip().endswith(f"left {expected}")


def test_a_resumed_run_counts_from_where_it_starts(monkeypatch):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr("octofold.train.console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Console(stream=stream).progress(600, 100) as progress:
        progress.update(RECORD)
    assert stream.getvalue().rstrip().endswith("left 8:00")


@settings(deadline=None, max_examples=40)
@given(values=st.dictionaries(st.sampled_from(sorted(RECORD.keys() - {"kind", "step"})), st.none() | st.floats()))
def test_any_number_and_any_missing_field_can_be_shown(values):
    stream = io.StringIO()
    with Console(stream=stream).progress(10, 10) as progress:
        progress.update({"kind": "train", "step": 10, **values})
    assert stream.getvalue().startswith("step 10/10")


def test_startup_shows_every_row_once():
    stream = io.StringIO()
    sections = {
        "model": {"total parameters": 10312448, "active parameters": 4812448},
        "device": {"precision": "bf16 [AMX]", "deterministic": True},
    }
    Console(stream=stream).startup("quickstart [1]", sections)
    lines = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines == [
        ["quickstart", "[1]"],
        ["model", "total", "parameters", "10,312,448"],
        ["active", "parameters", "4,812,448"],
        ["device", "precision", "bf16", "[AMX]"],
        ["deterministic", "True"],
    ]


def test_validation_gives_both_units():
    stream = io.StringIO()
    record = {"kind": "validation", "step": 100, "loss": 3.4, "loss_per_byte": 1.25, "tokens": 32768}
    Console(stream=stream).validation(record)
    line = stream.getvalue()
    assert line == "validation  step 100  loss 3.4000 nats/token  1.2500 nats/byte  32,768 tokens\n"


def test_final_compares_and_says_how_to_go_on():
    text = final_text(FINAL, checkpoint=Path("runs/my run/checkpoints/step_600"))
    assert re.search(r"trigram bytes +1\.8500 +-0\.1500", text)
    assert re.search(r"model \(1\.7000 nats/token\) +1\.7000", text)
    assert "better than the trigram model by 0.150 nats/byte" in text
    assert "def [bold]f[/bold](x):" in text
    assert "\x1b" not in text
    for line in (
        "checkpoint  runs/my run/checkpoints/step_600",
        "metrics     runs/my run/metrics.jsonl",
        """octofold sample 'runs/my run' "def \"""",
        "octofold report 'runs/my run'",
        "octofold train resume='runs/my run' train.steps=1200",
    ):
        assert line in text


def test_final_without_checkpoint_sample_or_baselines():
    text = final_text({**FINAL, "sample": "", "baselines": {}})
    assert "checkpoint" not in text
    assert "no trigram model" in text


def test_long_paths_stay_on_one_line():
    run_dir = Path("/" + "long-name/" * 30 + "run")
    assert f"run folder  {run_dir}\n" in final_text(FINAL, run_dir)


@pytest.mark.parametrize(
    ("loss", "trigram", "expected"),
    [
        (1.95, 1.85, "worse than the trigram model by 0.100"),
        (math.nan, 1.85, "diverged"),
        (math.inf, 1.85, "diverged"),
        (None, 1.85, "diverged"),
        (1.7, None, "no trigram"),
        (1.7, math.nan, "no trigram"),
    ],
)
def test_verdict(loss, trigram, expected):
    record = {**FINAL, "validation_loss": loss, "validation_loss_per_byte": loss, "baselines": {"trigram": trigram}}
    assert expected in verdict(record)
    assert expected in final_text(record)


def test_a_disabled_console_prints_nothing():
    stream = io.StringIO()
    console = Console(enabled=False, stream=stream)
    console.startup("t", {"a": {"b": 1}})
    with console.progress(10, 0) as progress:
        progress.update(RECORD)
    console.validation({"step": 1, "loss": 1.0, "loss_per_byte": 1.0, "tokens": 1})
    console.final(FINAL, run_dir=Path("r"), checkpoint=None)
    console.info("x")
    console.warn("y")
    assert stream.getvalue() == ""


def test_warnings_are_literal_text():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.warn("skipped [/3] lines")
    console.info("a [b] c")
    assert stream.getvalue() == "warning: skipped [/3] lines\na [b] c\n"


@given(st.text())
def test_printable_text_can_be_encoded_and_drives_no_terminal(text):
    cleaned = printable(text)
    cleaned.encode()
    assert len(cleaned) == len(text)
    assert all(char.isprintable() or char in "\n\t" for char in cleaned)


def test_an_ascii_stream_survives_any_text():
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.startup("é", {"模型": {"名": "专家"}})
    console.final({**FINAL, "sample": "é\ud800專"}, run_dir=Path("/tmp/é"), checkpoint=None)
    assert b"trigram" in raw.getvalue()


ON_TERMINAL = f"""
from math import inf
from octofold.train.console import Console
console = Console()
with console.progress(600, 0) as progress:
    progress.update({RECORD | {"loss": math.inf}!r})
    console.warn("look here")
"""


def test_a_terminal_gets_a_live_bar_and_warnings_above_it():
    main, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", ON_TERMINAL], stdout=child, stderr=child, env=env) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:  # Linux says so when the other side has closed
                break
            shown += chunk
            if not chunk:
                break
    os.close(main)
    assert process.returncode == 0, shown.decode()
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode())
    assert "120/600" in text
    assert "━" in text
    assert "loss inf  lr 1.9e-03  grad norm 0.42  imbalance 1.31  5,432 tokens/s" in text
    assert "warning: look here" in text
