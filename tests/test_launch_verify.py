"""`octofold verify precision`: its runs, its answers and exit statuses, and what it refuses."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty_kernels
import numpy as np
import pytest
from run_configs import write_corpus

from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import QTensor
from octofold.launch.cli import main
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import read_config
from octofold.launch.usage import VERIFY_SUBJECTS
from octofold.launch.verify_precision import RUNS, Products, _answer, _measured, variant
from octofold.train.config import PrecisionConfig
from octofold.train.metrics import read_metrics
from octofold.train.precision.config import LossScaleConfig
from octofold.train.precision.probe import Accusation
from octofold.train.precision.verdict import Answer, Verdict

FP8 = PrecisionConfig("fp8_block", arithmetic="emulate", block=16)
NO_SMOOTHING = ["verify.smoothing=0", "verify.steps=32"]


def texts(root: Path, *further: str) -> list[str]:
    """Overrides of a tiny FP8 run over the corpus in `root`."""
    model = ["model=tiny", "model.num_hidden_layers=2"]
    data = ["data=text", f"data.path={root / 'corpus'}", f"data.cache_dir={root / 'cache'}", "data.sequence_length=32"]
    batch = ["train.global_batch_size=4", "train.micro_batch_size=4", "train.final_eval_sequences=4"]
    precision = ["precision=fp8_block", "precision.arithmetic=emulate", "precision.block=16"]
    return [*model, *data, *batch, *precision, "backend=cpu", "backend.threads=1", "optim.warmup_steps=4", *further]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("verify"))


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"]


def test_a_short_run_is_inconclusive_and_leaves_three_runs(corpus, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["verify", "precision", *texts(corpus), f"run_dir={folder}", "verify.steps=12"]) == 3
    printed = capsys.readouterr().out
    assert "inconclusive: 12 steps are too few to tell; verify.steps=320" in printed
    assert "weight_gradient: fault against the reference" in printed
    result = result_of(folder)
    assert (result["answer"], result["accusations"], result["unmeasured"]) == ("inconclusive", [], None)
    assert "layers.1.mlp.experts.gate_up_proj" in result["modules"]
    assert (folder / "curves.png").stat().st_size > 10_000
    curves = {name: losses(folder / name) for name in RUNS}
    assert all(len(curve) == 12 for curve in curves.values()), "every step is logged"
    # The same weights and batches: one rounding more or less, and no more.
    assert curves["fp8"][0] == pytest.approx(curves["bf16"][0], rel=1e-2)
    assert curves["bf16_again"][0] == pytest.approx(curves["bf16"][0], rel=1e-3)
    assert curves["bf16"] != curves["bf16_again"]
    assert curves["bf16"] != curves["fp8"]
    assert read_config(folder / "fp8").precision == FP8
    assert read_config(folder / "bf16").precision.name == "bf16"

    # Another verification does not mix with this one.
    assert main(["verify", "precision", *texts(corpus), f"run_dir={folder}", "verify.steps=13"]) == 2
    assert "the same values as before, or another run_dir" in capsys.readouterr().err


def test_yes(corpus, tmp_path, capsys):
    """With a bar that even a few steps settle."""
    asked = [*texts(corpus), *NO_SMOOTHING, "verify.bar=0.2"]
    assert main(["verify", "precision", *asked, f"run_dir={tmp_path / 'out'}"]) == 0
    assert "does FP8 train like BF16? yes: relative error" in capsys.readouterr().out
    result = result_of(tmp_path / "out")
    assert result["answer"] == result["curves"]["answer"] == "yes"
    assert abs(result["curves"]["error"]["mean"]) < 0.2


def test_wrong_products_are_a_no_before_the_loss_shows_anything(corpus, tmp_path, capsys):
    faulty = texts(corpus, "kernels.quantize=faulty_kernels:saturating")
    assert main(["verify", "precision", *faulty, f"run_dir={tmp_path / 'out'}", "verify.steps=3"]) == 1
    printed = capsys.readouterr().out
    assert "gradient: saturated" in printed
    assert "does FP8 train like BF16? no:" in printed
    result = result_of(tmp_path / "out")
    assert result["answer"] == "no"
    assert result["curves"]["answer"] == "inconclusive"
    assert result["accusations"][0]["module"].startswith("layers.")


def test_a_loss_that_is_not_finite_is_a_no(corpus, tmp_path, capsys):
    """The FP8 run stops; the others still run, and show that the configuration is not at fault."""
    broken = texts(corpus, "kernels.quantize=faulty_kernels:broken")
    assert main(["verify", "precision", *broken, f"run_dir={tmp_path / 'out'}", "verify.steps=24"]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("does FP8 train like BF16? no: FP8's loss is not finite at 21 step(s)")
    assert line.endswith("; products were not measured: the FP8 run saved no checkpoint")
    assert result_of(tmp_path / "out")["unmeasured"] == "the FP8 run saved no checkpoint"
    assert len(losses(tmp_path / "out" / "bf16_again")) == 24


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_verification_even_where_the_loss_is_not_finite(
    number, status, corpus, tmp_path, monkeypatch
):
    """Only the failure of a run that diverged lets the others begin."""
    told: list[int] = []

    def broken_and_interrupted(*args: Any, **options: Any) -> QTensor:
        if not told:  # once: a second Ctrl-C ends the process where the step has taken more than a second
            told.append(number)
            signal.raise_signal(number)
        return faulty_kernels.broken(*args, **options)

    monkeypatch.setattr(faulty_kernels, "interrupted", broken_and_interrupted, raising=False)
    broken = texts(corpus, "kernels.quantize=faulty_kernels:interrupted")
    assert main(["verify", "precision", *broken, f"run_dir={tmp_path / 'out'}", "verify.steps=24"]) == status
    assert np.isnan(losses(tmp_path / "out" / "fp8")).any()
    assert not (tmp_path / "out" / "bf16").exists()
    assert not (tmp_path / "out" / "result.json").exists()


CURVES: dict[Answer, Verdict] = {
    "yes": Verdict("yes", "they agree", 32, 1, None, None),
    "no": Verdict("no", "they do not agree", 32, 1, None, None),
    "inconclusive": Verdict("inconclusive", "too few", 32, 1, None, None),
}
WHY = "the FP8 run saved no checkpoint"


@pytest.mark.parametrize(
    ("curves", "unmeasured", "accused", "answer"),
    [
        ("yes", None, False, ("yes", "they agree")),
        ("no", None, False, ("no", "they do not agree")),
        ("yes", WHY, False, ("inconclusive", f"products were not measured: {WHY}; curves: they agree")),
        ("inconclusive", WHY, False, ("inconclusive", f"products were not measured: {WHY}; curves: too few")),
        ("no", WHY, False, ("no", f"they do not agree; products were not measured: {WHY}")),
        ("yes", None, True, ("no", "1 number(s) of the products are beyond their thresholds; curves: they agree")),
        ("yes", WHY, True, ("no", "1 number(s) of the products are beyond their thresholds; curves: they agree")),
    ],
)
def test_the_answer(curves, unmeasured, accused, answer):
    accusations = [Accusation("lm_head", "forward: fault", 0.5, 0.01)] if accused else []
    assert _answer(CURVES[curves], Products({}, accusations, unmeasured)) == answer


def test_products_in_bf16_are_no_yes(corpus, tmp_path, capsys):
    """What the curves alone would call one: see `test_yes`."""
    asked = [*texts(corpus, "precision.arithmetic=storage"), *NO_SMOOTHING, "verify.bar=0.2"]
    assert main(["verify", "precision", *asked, f"run_dir={tmp_path / 'out'}"]) == 3
    line = capsys.readouterr().out.splitlines()[-1]
    why = "none is formed in FP8 with precision.arithmetic=storage"
    assert line.startswith(
        f"does FP8 train like BF16? inconclusive: products were not measured: {why}; curves: relative"
    )
    result = result_of(tmp_path / "out")
    assert (result["answer"], result["curves"]["answer"], result["unmeasured"]) == ("inconclusive", "yes", why)


def test_why_products_were_not_measured_is_told_in_a_line(corpus, tmp_path):
    folder = tmp_path / "out"
    assert main(["verify", "precision", *texts(corpus), f"run_dir={folder}", "verify.steps=2"]) == 3
    config = read_config(folder / "fp8")
    assert _measured(config, folder / "fp8").unmeasured is None
    shard = next((folder / "fp8" / "checkpoints" / "step_2").rglob("*.safetensors"))
    shard.write_bytes(b"")
    products = _measured(config, folder / "fp8")
    assert products.unmeasured is not None
    assert f"{shard} holds 0 bytes, but " in products.unmeasured
    assert "\n" not in products.unmeasured
    assert not products.probes


def test_more_seeds_are_added_to_what_there_is(corpus, tmp_path):
    asked = texts(corpus, "train.seed=5", "verify.steps=2")
    folder = tmp_path / "out"
    assert main(["verify", "precision", *asked, f"run_dir={folder}"]) == 3
    before = {name: (folder / name / "metrics.jsonl").read_text() for name in RUNS}
    # As if interrupted: this one has to be trained again.
    shutil.rmtree(folder / "bf16" / "checkpoints")
    assert main(["verify", "precision", *asked, f"run_dir={folder}", "verify.seeds=2"]) == 3
    for name in RUNS:
        assert ((folder / name / "metrics.jsonl").read_text() == before[name]) == (name != "bf16")
        assert len(losses(folder / name)) == 2
        assert read_config(folder / "seed_6" / name).train.seed == 6
    assert losses(folder / "bf16") != losses(folder / "seed_6" / "bf16")
    assert result_of(folder)["curves"]["seeds"] == 2


@pytest.mark.slow
def test_on_two_ranks(corpus, tmp_path):
    split = ["train.micro_batch_size=2", "parallel.expert=2", "launch.nproc_per_node=2"]
    asked = texts(corpus, *split, "verify.steps=4", f"run_dir={tmp_path / 'out'}")
    assert main(["verify", "precision", *asked]) == 3
    assert result_of(tmp_path / "out")["accusations"] == []
    assert result_of(tmp_path / "out")["modules"]


def test_the_runs_differ_in_what_they_are_to_differ_in():
    asked = JobConfig(precision=PrecisionConfig("mxfp8", loss_scale=LossScaleConfig("dynamic")))
    assert variant(asked, "fp8") == asked
    bf16, again = variant(asked, "bf16"), variant(asked, "bf16_again")
    assert bf16 == replace(asked, precision=PrecisionConfig("bf16", loss_scale=LossScaleConfig("dynamic")))
    assert again == replace(bf16, kernels=KernelsConfig(rms_norm="reference", swiglu="reference"))
    referred = replace(asked, kernels=KernelsConfig(rms_norm="reference", swiglu="mine:swiglu"))
    assert variant(referred, "bf16_again").kernels == KernelsConfig(rms_norm="torch", swiglu="reference")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "verify \n  rule:   what is verified is one of: layout, precision, resume\n  remedy: octofold verify"),
        (["precise"], "verify precise\n  rule:   what is verified is one of: layout, precision, resume"),
        (["precision"], "precision=bf16\n  rule:   BF16 is what FP8 is compared with"),
        (["precision", "precision=fp8_block", "resume=auto"], "remedy: leave resume out"),
        (["precision", "verify.steps=0"], "verify.steps=0\n  rule:   at least one step"),
        (["precision", "verify.seeds=0"], "verify.seeds=0\n  rule:   at least one seed"),
        (["precision", "verify.smoothing=1"], "verify.smoothing=1.0\n  rule:   the weight of the past, from 0"),
        (["precision", "verify.smoothing=-0.1"], "verify.smoothing=-0.1"),
        (["precision", "verify.bar=0"], "verify.bar=0.0\n  rule:   a relative error between 0 and 1"),
        (["precision", "verify.bar=much"], "verify.bar=much\n  rule:   verify.bar is a number"),
        (["precision", "verify.seed=3"], "there is no key verify.seed\n  remedy: verify.seeds=3"),
        (["precision", "precision=fp8_block", "train.stepz=3"], "there is no key train.stepz"),
        (["precision", "verify"], "an override is written key=value"),
        (["precision", "--multirun"], "key=value overrides and --config-dir"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "refused",
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_fp8_that_the_device_lacks_is_refused_before_anything_is_trained(corpus, tmp_path, capsys):
    native = texts(corpus, "precision.arithmetic=native")
    assert main(["verify", "precision", *native, f"run_dir={tmp_path / 'out'}"]) == 2
    assert "precision.arithmetic=emulate" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bf16").exists()


def test_a_launcher_is_refused(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "precision", "precision=fp8_block"]) == 2
    assert "start it once" in capsys.readouterr().err


def test_help(capsys):
    assert main(["verify", "--help"]) == 0
    assert "0 yes, 1 no, 3 inconclusive" in capsys.readouterr().out


@pytest.mark.parametrize("subject", VERIFY_SUBJECTS)
def test_help_on_one_subject_has_its_keys_alone(subject, capsys):
    assert main(["verify", subject, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: octofold verify {subject} [")
    assert "verify.steps=" in printed
    assert [other for other in VERIFY_SUBJECTS if f"\n{other}: " in printed] == [subject]
