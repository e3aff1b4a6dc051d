"""The run's record: what is written comes back, also after a crash or a resume, and the sinks get it too."""

import builtins
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import UserError
from octofold.train.metrics import HEALTH_METRICS, MetricsWriter, read_metrics, worst


def open_writer(run_dir: Path, resumed_step: int | None = None, **sinks: bool) -> MetricsWriter:
    options = {"wandb": False, "tensorboard": False, **sinks}
    return MetricsWriter(run_dir, run_name="test", config={"train": {"steps": 3}}, resumed_step=resumed_step, **options)


def train_record(step: int, **fields: object) -> dict:
    load = {"1": [0.25, 0.75], "2": [0.5, 0.5]}
    balance = {"imbalance": {"1": 1.5, "2": 1.0}, "load_entropy": {"1": 0.81, "2": 1.0}}
    record = {"kind": "train", "step": step, "loss": 5.0 / step, "mtp_losses": [6.0, 7.0], "z_loss": 2.5}
    modules = {"a.q_proj": health(0.25, 30.0), "a.o_proj": health(0.5, 31.0)}
    precision = {"activation": modules, "weight": {}}
    return {**record, "lr": 1e-3, "precision_health": precision, "balance": balance, "expert_load": load, **fields}


def health(underflow: float, snr_db: float) -> dict[str, float]:
    """Of one module."""
    return dict.fromkeys(HEALTH_METRICS, 0.0) | {"underflow": underflow, "snr_db": snr_db}


FINAL = {
    "kind": "final",
    "step": 3,
    "validation_loss": 1.5,
    "validation_loss_per_byte": 1.5,
    "baselines": {"trigram": 1.85},
    "sample": "def f():\n    'NaN'\n",
    "train_s": 2.0,
}


def write(run_dir: Path, steps: range, resumed_step: int | None = None) -> None:
    writer = open_writer(run_dir, resumed_step)
    for step in steps:
        writer.log(train_record(step))
    writer.close()


def test_records_come_back_as_they_were_written(tmp_path):
    writer = open_writer(tmp_path / "new" / "run")
    records = [
        train_record(1),
        {"kind": "validation", "step": 1, "loss": 3.0, "loss_per_byte": 3.0, "tokens": 7},
        FINAL,
    ]
    for count, record in enumerate(records, start=1):
        writer.log(record)
        assert read_metrics(tmp_path / "new" / "run") == records[:count]  # readable while the run goes on
    writer.close()
    writer.close()


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


json_values = st.recursive(
    st.floats() | st.integers() | st.text() | st.none() | st.booleans(),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text("abc", min_size=1), child, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=60)
@given(fields=st.dictionaries(st.sampled_from(["loss", "lr", "x", "y"]), json_values))
def test_any_plain_value_survives_and_every_line_is_strict_json(tmp_path_factory, fields):
    run_dir = tmp_path_factory.mktemp("run")
    record = {"kind": "train", "step": 1, **fields}
    writer = open_writer(run_dir)
    writer.log(record)
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)
    (back,) = read_metrics(run_dir)
    assert repr(back) == repr(record)  # repr, since NaN != NaN


def test_non_finite_values_are_null_with_a_marker(tmp_path):
    writer = open_writer(tmp_path)
    writer.log(train_record(1, loss=math.nan, grad_norm=math.inf, expert_load={"3": [0.5, -math.inf]}))
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "inf", "expert_load/3/1": "-inf"}


def test_a_value_json_does_not_know_leaves_the_file_whole(tmp_path):
    writer = open_writer(tmp_path)
    with pytest.raises(TypeError):
        writer.log(train_record(1, loss=object()))
    writer.log(train_record(2))
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [2]


def test_resume_drops_the_steps_about_to_be_repeated(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), resumed_step=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_going_back_drops_later_steps_and_keeps_why(tmp_path):
    """Also through a resume from before the anomaly: the batch that was left out does not come again to tell of it."""
    anomaly = {"kind": "anomaly", "step": 4, "value": math.nan, "action": "rolled_back", "account": "loss is nan"}
    writer = open_writer(tmp_path)
    for step in range(1, 5):
        writer.log(train_record(step))
    writer.log({**anomaly, "step": 2, "action": "skipped"})
    writer.rewind(2)
    writer.log(anomaly)
    writer.log(train_record(3))
    writer.close()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == [
        *(("train", step) for step in (1, 2)),
        *(("anomaly", step) for step in (2, 4)),
        ("train", 3),
    ]
    open_writer(tmp_path, resumed_step=1).close()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == [("train", 1), ("anomaly", 4)]


def test_resume_keeps_non_finite_values(tmp_path):
    writer = open_writer(tmp_path)
    writer.log(train_record(1, loss=math.nan))
    writer.close()
    open_writer(tmp_path, resumed_step=1).close()
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_a_fresh_start_sets_earlier_records_aside(tmp_path):
    for start in (1, 2, 3):
        write(tmp_path, range(start, 4))
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]
    assert len((tmp_path / "metrics-1.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "metrics-2.jsonl").read_text().splitlines()) == 2


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(min_value=1, max_value=120))
def test_a_torn_last_line_costs_only_itself(tmp_path_factory, cut):
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, range(1, 4))
    path = run_dir / "metrics.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    os.truncate(path, path.stat().st_size - min(cut, len(last)))
    assert [record["step"] for record in read_metrics(run_dir)][:2] == [1, 2]
    write(run_dir, range(3, 5), resumed_step=2)
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"{",
        b"\xff\xfe",
        b"\0\0\0",
        b"[1]",
        b"7",
        b'{"step": 1}',
        b'{"kind": "train", "step": "x"}',
        b'{"kind": "train", "step": 1, "non_finite": 3}',
        b'{"kind": "train", "step": 1, "non_finite": {"a/b": "nan"}}',
    ],
)
def test_a_corrupt_line_in_the_middle_is_named_and_skipped(tmp_path, caplog, rubbish):
    write(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, rubbish, second, b""]))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert "metrics.jsonl, line 2" in caplog.text


def test_tensorboard_files_hold_the_curves_and_a_resume_does_not_double_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = open_writer(tmp_path, tensorboard=True)
    for step in range(1, 6):
        writer.log(train_record(step))
    writer.close()
    writer = open_writer(tmp_path, resumed_step=3, tensorboard=True)
    writer.log(train_record(4, loss=math.nan))
    writer.log(FINAL)
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert losses[1].value == pytest.approx(2.5)
    assert math.isnan(losses[3].value)
    assert events.Scalars("imbalance/layer_1")[0].value == pytest.approx(1.5)
    assert events.Scalars("load_entropy/layer_2")[0].value == 1.0
    assert events.Scalars("train/mtp_loss_2")[0].value == 7.0
    assert events.Scalars("train/z_loss")[0].value == 2.5
    assert events.Scalars("activation_underflow/a.o_proj")[0].value == 0.5
    assert events.Scalars("activation_snr_db/a.q_proj")[0].value == 30.0
    assert events.Scalars("precision/activation_underflow_worst")[0].value == 0.5
    assert events.Scalars("precision/activation_snr_db_worst")[0].value == 30.0
    nested = ("train/balance", "train/expert_load", "train/precision")
    assert not [name for name in events.Tags()["scalars"] if name.startswith(nested)]
    assert events.Scalars("final/baselines/trigram")[0].value == pytest.approx(1.85)
    assert "final/sample/text_summary" in events.Tags()["tensors"]


def test_the_worst_of_some_modules():
    modules = {"a": health(0.1, 30.0), "b": health(0.2, 20.0), "c": health(0.0, math.inf)}
    assert worst("underflow", modules) == ("b", 0.2)
    assert worst("snr_db", modules) == ("b", 20.0)
    assert worst("amax", modules) == ("a", 0.0)
    name, value = worst("snr_db", {**modules, "d": health(math.nan, math.nan), "e": health(0.9, -math.inf)})
    assert name == "d"
    assert math.isnan(value)


WITH_WANDB = """
import sys
from pathlib import Path
from octofold.train.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), run_name="test", config={"train": {"steps": 3}}, wandb=True,
                       tensorboard=False, resumed_step=None)
writer.log({"kind": "train", "step": 1, "loss": 1.5, "mtp_losses": [2.5], "balance": {"load_entropy": {"1": 1.0}},
            "expert_load": {"1": [0.5, 0.5]}, "precision_health": {"gradient": {"a.q_proj": {
            "underflow": 0.5, "saturation": 0.0, "amax": 1.0, "scale_spread": 0.0, "snr_db": 30.0,
            "non_finite_tiles": 0.0}}}})
writer.log({"kind": "final", "step": 1, "sample": "def f"})
writer.close()
"""


WANDB_NAMES = (b"train/loss", b"train/mtp_loss_1", b"load_entropy/layer_1", b"gradient_underflow/a.q_proj")


def test_wandb_is_offline_where_nobody_is_logged_in(tmp_path):
    pytest.importorskip("wandb")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-c", WITH_WANDB, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    written = next(offline.glob("*.wandb")).read_bytes()
    assert all(name in written for name in WANDB_NAMES)
    assert len(read_metrics(tmp_path / "run")) == 2


def test_wandb_says_what_is_wrong_with_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.raises(UserError, match=r"(?s)API key must have.*WANDB_MODE=offline"):
        open_writer(tmp_path, wandb=True)


@pytest.mark.parametrize("sink", ["wandb", "tensorboard"])
def test_a_missing_sink_is_refused_with_the_remedy_and_touches_nothing(tmp_path, monkeypatch, sink):
    write(tmp_path, range(1, 3))
    real_import = builtins.__import__

    def without_sink(name, *args, **kwargs):
        if name == "wandb" or name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError(f"No module named '{sink}'", name=sink)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sink)
    with pytest.raises(UserError, match=rf"(?s)train\.{sink}=true.*pip install 'octofold\[track\]'"):
        open_writer(tmp_path, **{sink: True})
    assert len(read_metrics(tmp_path)) == 2


def test_importing_stays_light():
    code = "import sys, octofold.train.metrics; print({'torch', 'wandb', 'tensorboard'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
