"""`octofold report` draws what a run recorded, whatever state the run is in, and refuses a folder without a run."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from octofold.backends.errors import UserError
from octofold.launch.report import report
from octofold.launch.report_plots import PLOTS, smooth
from octofold.launch.report_precision import precision_plots, worst_modules
from octofold.parallel.balance import load_metrics
from octofold.train.metrics import MetricsWriter, read_metrics

OTHERS_FINALIZERS = "ignore::pytest.PytestUnraisableExceptionWarning"
"""What earlier tests left may be collected here: torch's rendezvous timer complains where its own thread does it."""

BAD_NAME = "a <b>&$x^"


def make_run(
    run_dir: Path,
    *,
    steps: int = 200,
    layers: int = 3,
    n_experts: int = 8,
    bytes_per_token: float = 1.0,
    validate: bool = True,
    final: bool = True,
    depths: int = 0,
    losses: tuple[str, ...] = (),
    fp8_modules: int = 0,
    **broken: object,
) -> Path:
    """A run folder like a trainer's, a record every 10 steps, with `depths` of multi-token prediction, balance `losses`
    and `fp8_modules` sampled every 20 steps; `broken` overrides fields of the last train record."""
    rng = np.random.default_rng(0)
    options = {"wandb": False, "tensorboard": False, "resumed_step": None}
    writer = MetricsWriter(run_dir, run_name="test", config={}, **options)
    for step in range(10, steps + 1, 10):
        loss = 1.5 + 4 * math.exp(-step / 60)
        shares_LE = rng.dirichlet(np.full(n_experts, 20.0), layers)
        record = {
            "kind": "train",
            "step": step,
            "loss": loss * bytes_per_token,
            "lr": 1e-3,
            "grad_norm": float(rng.lognormal()),
            "tokens": step * 4096,
            "tokens_per_s": 5400.0 + step,
            "step_s": 0.7,
            "time_s": 0.7 * step,
            "unused_experts": 0,
        }
        if layers:
            record["imbalance"] = float(shares_LE.max() * n_experts)
            record["expert_load"] = {str(layer + 1): shares.tolist() for layer, shares in enumerate(shares_LE)}
            metrics = load_metrics(torch.from_numpy(shares_LE))
            record["balance"] = {
                name: {str(layer + 1): value for layer, value in enumerate(of_layers.tolist())}
                for name, of_layers in metrics.items()
            }
        if depths:
            record["mtp_losses"] = [loss * bytes_per_token + depth for depth in range(1, depths + 1)]
        record |= {f"{name}_loss": 1 + 1 / step for name in losses}
        if fp8_modules:
            record |= {"loss_scale": 2.0 ** (16 - step // 100), "overflows": step // 100}
            record |= {"model_tflops": 0.02, "mfu": 0.4}
        if fp8_modules and step % 20 == 0:
            record["precision_health"] = health(fp8_modules, step)
        writer.log(record | (broken if step == steps else {}))
        if validate and step % 50 == 0:
            units = {"loss": loss * bytes_per_token, "loss_per_byte": loss}
            writer.log({"kind": "validation", "step": step, "tokens": 32768, **units})
    if final:
        writer.log(
            {
                "kind": "final",
                "step": steps,
                "validation_loss": 1.7 * bytes_per_token,
                "validation_loss_per_byte": 1.7,
                "baselines": {"unigram": 3.26, "bigram": 2.48, "trigram": 1.85},
                "sample": "def f(x):\n    return x < 1 & '</pre><script>alert(1)</script>'\x1b[0m\ud800",
                "train_s": 450.0,
            }
        )
    writer.close()
    return run_dir


def health(modules: int, step: int, **broken: float) -> dict:
    """A sample in which module n has n + 1 times the underflow of module 0, and weights lose nothing; `broken` goes to
    the gradient of module 0."""
    kinds = ("activation", "weight", "gradient")
    sample: dict = {kind: {} for kind in kinds}
    for kind in kinds:
        for module in range(modules):
            sample[kind][f"layers.{module}.<proj>"] = {
                "underflow": 0.0 if kind == "weight" else 1e-4 * step * (module + 1),
                "saturation": 0.0,
                "amax": 3.0 + module,
                "scale_spread": 2.0 * module,
                "snr_db": 30.0 - module,
                "non_finite_tiles": 0.0,
            }
    sample["gradient"]["layers.0.<proj>"] |= broken
    return sample


class Page(HTMLParser):
    """Reads a page, checks that tags pair up, keeps texts, image sources and tags."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_a_finished_run_gets_every_plot_and_a_page(tmp_path):
    run_dir = make_run(tmp_path / "run")
    config = {"name": BAD_NAME, "model": {"hidden_size": 256, "q_lora_rank": None}, "data": {"path": "<x>&"}}
    (run_dir / "config.yaml").write_text(json.dumps(config | {"train": None}))  # JSON is YAML
    paths = report(run_dir)
    names = ["overview.png", *(f"{name}.png" for name in PLOTS), "index.html"]
    assert [path.name for path in paths] == names
    for path in paths[:-1]:
        image = pixels(path)
        assert image.shape[0] > 400
        assert image.shape[1] > 800
        drawn = (image[..., :3] < 0.9).any(axis=-1).mean()
        assert 0.005 < drawn < 0.9, f"{path.name}: {drawn:.1%} of the pixels are drawn on"
    page = Page(paths[-1])
    assert page.tags.count("img") == len(PLOTS)
    assert "script" not in page.tags
    for source, path in zip(page.sources, paths[1:-1], strict=True):  # nothing is fetched from elsewhere
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert BAD_NAME in page.text
    assert "better than the trigram model by 0.150" in page.text
    assert "return x < 1 & '</pre><script>alert(1)</script>'" in page.text
    assert "\x1b" not in page.text
    assert "model.hidden_size256" in page.text
    assert "data.path<x>&" in page.text
    assert "q_lora_rank" not in page.text
    assert "1.7000 nats/token, 1.7000 nats/byte (step 200)" in page.text
    assert re.search(r"entropy of expert load0\.9\d\d of 1 in the least even layer", page.text)


def axes_of(plot: str, run_dir: Path):
    from matplotlib.figure import Figure

    axes, records = Figure().subplots(), read_metrics(run_dir)
    {**PLOTS, **precision_plots(records)}[plot](axes, records)
    return axes


def lines_of(plot: str, run_dir: Path) -> dict[str, list[float]]:
    """What a plot draws, by the names in its legend."""
    return {line.get_label(): list(line.get_ydata()) for line in axes_of(plot, run_dir).lines}


def test_losses_and_baselines_share_nats_a_byte(tmp_path):
    axes = axes_of("loss", make_run(tmp_path, bytes_per_token=3.4))
    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_ylabel() == "loss (nats/byte)"
    assert lines["training (÷ 3.40 bytes/token)"].get_ydata()[-1] == pytest.approx(1.5 + 4 * math.exp(-200 / 60))
    assert list(lines["validation"].get_xdata()) == [50, 100, 150, 200]
    assert lines["validation"].get_ydata()[-1] == pytest.approx(1.7)
    assert lines["trigram bytes: 1.85"].get_ydata()[0] == 1.85


def test_without_a_validation_the_loss_stays_in_nats_a_token(tmp_path):
    axes = axes_of("loss", make_run(tmp_path, validate=False, final=False))
    assert axes.get_ylabel() == "loss (nats/token)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training"]


def test_losses_of_further_tokens_share_the_unit_of_the_loss(tmp_path):
    lines = lines_of("loss", make_run(tmp_path, bytes_per_token=2.0, depths=2))
    loss = lines["training (÷ 2.00 bytes/token)"][-1]
    assert lines["MTP depth 1"][-1] == pytest.approx(loss + 0.5)
    assert lines["MTP depth 2"][-1] == pytest.approx(loss + 1)


def test_layers_are_drawn_as_they_were_recorded(tmp_path):
    run_dir = make_run(tmp_path)
    last = read_metrics(run_dir)[-3]["balance"]
    for plot, name in [
        ("expert_imbalance", "imbalance"),
        ("expert_entropy", "load_entropy"),
        ("unused_experts", "unused_share"),
    ]:
        lines = lines_of(plot, run_dir)
        assert lines.keys() == {"layer 1", "layer 2", "layer 3", "balanced"}
        assert {f"layer {layer}": value for layer, value in last[name].items()} == pytest.approx(
            {label: values[-1] for label, values in lines.items() if label != "balanced"}
        )


def test_balance_losses_are_drawn_where_there_are_some(tmp_path):
    lines = lines_of("balance_losses", make_run(tmp_path / "v3", losses=("sequence", "z")))
    assert {name: values[-1] for name, values in lines.items()} == pytest.approx({"sequence": 1.005, "z": 1.005})
    none = axes_of("balance_losses", make_run(tmp_path / "none"))
    assert [text.get_text() for text in none.texts] == ["no balance losses"]


def test_the_health_of_fp8_tensors_is_drawn_by_kind_and_shown_where_it_is_worst(tmp_path):
    run_dir = make_run(tmp_path, steps=40, fp8_modules=3)
    paths = report(run_dir)
    shown = ["precision_underflow", "precision_saturation", "precision_snr", "precision_scale_spread", "loss_scale"]
    assert [path.stem for path in paths[1 + len(PLOTS) : -1]] == shown
    lines = lines_of("precision_underflow", run_dir)
    assert lines.keys() == {f"{kind}, {of}" for kind in health(1, 0) for of in ("median", "worst")}
    assert lines["gradient, median"] == pytest.approx([4e-3, 8e-3])
    assert lines["gradient, worst"] == pytest.approx([6e-3, 12e-3])
    assert lines_of("precision_snr", run_dir)["activation, worst"] == [28.0, 28.0], "the lowest is the worst"
    assert lines_of("precision_scale_spread", run_dir)["weight, worst"] == [4.0, 4.0]
    text = Page(paths[-1]).text
    assert "Worst FP8 modules at step 40" in text
    assert "gradient: underflow1.200% in layers.2.<proj> (median 0.800%)" in text
    assert "activation: signal-to-noise ratio (dB)28.0 in layers.2.<proj> (median 29.0)" in text
    assert "MFU40.0% (median)" in text
    assert "model FLOP/s0.02 TFLOP/s a rank (median)" in text


def test_the_loss_scale_is_drawn_with_what_it_cost(tmp_path):
    (label, scales), *none = lines_of("loss_scale", make_run(tmp_path, fp8_modules=1)).items()
    assert not none
    assert label == "2 updates skipped"
    assert (scales[0], scales[-1]) == (2.0**16, 2.0**14)


@pytest.mark.filterwarnings("error", OTHERS_FINALIZERS)
@pytest.mark.parametrize(
    "broken",
    [
        {"snr_db": math.inf},
        {"snr_db": math.nan, "underflow": math.nan, "saturation": math.nan},
        {"amax": math.inf, "non_finite_tiles": 4.0},
    ],
)
def test_tensors_that_broke_are_the_worst(tmp_path, broken):
    run_dir = make_run(tmp_path, steps=20, fp8_modules=3, precision_health=health(3, 20, **broken))
    records = read_metrics(run_dir)
    step, rows = worst_modules(records)
    assert step == 20
    worst = {name.partition(": ")[2] for name, text in rows.items() if "layers.0." in text and name[0] == "g"}
    by_name = {"underflow": "underflow", "saturation": "saturation", "snr_db": "signal-to-noise ratio (dB)"}
    by_name |= {"amax": "largest magnitude", "non_finite_tiles": "tiles that were not finite"}
    assert worst >= {by_name[metric] for metric, value in broken.items() if value != math.inf or metric == "amax"}
    for plot in precision_plots(records):
        axes_of(plot, run_dir).figure.canvas.draw()


def test_a_run_without_fp8_has_no_plots_of_it(tmp_path):
    records = read_metrics(make_run(tmp_path, steps=20))
    assert precision_plots(records) == {}
    assert worst_modules(records) is None
    unseen = read_metrics(make_run(tmp_path / "none", steps=20, precision_health={"activation": {}, "weight": {}}))
    assert precision_plots(unseen) == {}


@pytest.mark.filterwarnings("error", OTHERS_FINALIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {"final": False},
        {"steps": 10, "validate": False, "final": False},
        {"steps": 10, "loss": math.nan, "grad_norm": math.inf, "tokens_per_s": math.nan, "imbalance": math.nan},
        {"loss": math.nan, "grad_norm": 0.0},
        {"layers": 0, "final": False},
        {"steps": 30, "layers": 40, "n_experts": 64},
        {"steps": 30, "layers": 2, "n_experts": 1},
        {"depths": 2, "losses": ("sequence", "expert", "device", "communication", "z"), "validate": False},
        {"depths": 1, "losses": ("z",), "z_loss": math.nan, "mtp_losses": [math.nan], "steps": 10},
    ],
    ids=[
        "unfinished",
        "one record",
        "one broken record",
        "NaN at the end",
        "dense",
        "wide",
        "one expert",
        "every loss",
        "every loss broken",
    ],
)
def test_any_state_of_a_run_can_be_drawn(tmp_path, options):
    *_, page = report(make_run(tmp_path, **options))
    text = Page(page).text
    assert ("has not ended yet" in text) == (options.get("final", True) is False)


def test_a_second_report_replaces_the_first(tmp_path):
    assert report(make_run(tmp_path)) == report(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        report(tmp_path / "missing")
    with pytest.raises(UserError, match="not a run folder"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "validation", "step": 1}\n{"kind": "tra')
    with pytest.raises(UserError, match="no training records"):
        report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "just words", "\x00"])
def test_a_broken_config_is_refused_by_name(tmp_path, text):
    make_run(tmp_path, steps=10)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        report(tmp_path)


def test_smoothing_has_no_lag_and_leaves_gaps_at_non_finite_values():
    ramp = np.arange(200.0)
    assert np.allclose(smooth(ramp), ramp)
    ramp[50] = np.nan
    smoothed = smooth(ramp)
    assert np.isnan(smoothed[50])
    assert np.isfinite(np.delete(smoothed, 50)).all()
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise).std() < 0.4 * noise.std()
