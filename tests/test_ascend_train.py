"""`octofold train backend=ascend backend.software=true`: the command, its ranks, and losses that are the CPU's."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from job_processes import COMMAND
from run_configs import write_corpus

pytestmark = pytest.mark.ascend

MODEL = ["experiment=quickstart", "model=tiny", "model.num_hidden_layers=2", "precision.block=16"]
BATCH = ["data.sequence_length=32", "train.steps=4", "train.log_every=1", "optim.warmup_steps=1", "backend.threads=1"]
NO_MORE = ["train.eval_every=0", "train.final_eval_sequences=4", "train.sample_tokens=0"]
NPU_OPS = ["attention", "grouped_mm", "rms_norm", "rotary", "swiglu", "gate_topk", "permute", "unpermute"]
FOUR = ["launch.nproc_per_node=4", "train.micro_batch_size=1"]
LAYOUTS = {
    "one rank": ["launch.nproc_per_node=1", "parallel.expert=1"],
    "expert": ["launch.nproc_per_node=2", "parallel.expert=2"],
    "fsdp": ["launch.nproc_per_node=2", "parallel.expert=1"],
    "context": ["launch.nproc_per_node=2", "parallel.expert=1", "parallel.context=2"],
    "two stages": [*FOUR, "parallel.expert=4", "backend.ranks_per_node=2"],
}
PAUSED = ["backend=ascend", "backend.software=true", *LAYOUTS["expert"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small corpus."""
    root = tmp_path_factory.mktemp("data")
    return ["data=text", f"data.path={write_corpus(root) / 'corpus'}", f"data.cache_dir={root / 'cache'}"]


def losses(folder: Path, *overrides: str, **settings: str) -> list[float]:
    """Of each step of a run.

    Args:
        settings: of the software NPU; ASYNC="1" is SOFTWARE_NPU_ASYNC=1.
    """
    command = [*COMMAND, *MODEL, *BATCH, *NO_MORE, *overrides, f"run_dir={folder}"]
    environment = {**os.environ, **{f"SOFTWARE_NPU_{key}": value for key, value in settings.items()}}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    if "backend=ascend" in overrides:
        # The start-up table: operators of torch_npu were chosen.
        assert set(re.findall(rf"\b({'|'.join(NPU_OPS)}) +npu\b", done.stdout)) == set(NPU_OPS), done.stdout
        assert re.search(r"\bHCCL_EXEC_TIMEOUT +600\b", done.stdout), done.stdout
        assert re.search(r"\bHCCL_DETERMINISTIC +true\b", done.stdout), done.stdout
        emulates = "experts' weight gradients BF16 products of decoded operands" in " ".join(done.stdout.split())
        assert emulates == ("precision.arithmetic=native" in overrides), done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_the_cpu(layout, data, tmp_path):
    on_cpu = losses(tmp_path / "cpu", *data, "backend=cpu", *LAYOUTS[layout])
    on_npu = losses(tmp_path / "npu", *data, "backend=ascend", "backend.software=true", *LAYOUTS[layout])
    assert len(on_npu) == 4
    assert on_npu == pytest.approx(on_cpu, rel=2e-3)


@pytest.fixture(scope="module")
def in_order(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two expert ranks on streams that do everything in the call."""
    return losses(tmp_path_factory.mktemp("in_order") / "run", *data, *PAUSED)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_asynchronous_streams_with_pauses_of_chance_change_no_bit(seed, data, in_order, tmp_path):
    assert losses(tmp_path / "run", *data, *PAUSED, ASYNC="1", DELAY_US="300", SEED=str(seed)) == in_order


@pytest.mark.parametrize("soc", ["Ascend910B2", "Ascend910_9392"])
def test_two_ranks_train_in_bf16_under_older_names(soc, data, tmp_path):
    """There torch_npu launches some operators between ranks by name (Fill, PadV3)."""
    arguments = [*data, *LAYOUTS["expert"], "precision=bf16", "train.steps=2"]
    on_cpu = losses(tmp_path / "cpu", *arguments, "backend=cpu")
    on_npu = losses(tmp_path / "npu", *arguments, "backend=ascend", "backend.software=true", SOC=soc)
    assert on_npu == pytest.approx(on_cpu, rel=2e-3)


TWO_STEPS = ["train.steps=2"]
MX = ["precision=mxfp8", "precision.block=128"]
CASES = {
    "mxfp8": ("Ascend950PR_9599", [*LAYOUTS["one rank"], *MX], "native", "emulate"),
    "storage": ("Ascend910_9392", [*LAYOUTS["expert"], "precision=fp8_block", "precision.block=16"], *["storage"] * 2),
    "pipeline": ("Ascend950PR_9599", [*LAYOUTS["fsdp"], "parallel.pipeline=2"], *["emulate"] * 2),
}
"""SoC, what both runs are told, and the arithmetic of the NPU's run and of the CPU's."""


@pytest.mark.parametrize("case", ["mxfp8", "storage", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_arithmetic_and_pipeline_are_those_of_the_cpu(case, data, tmp_path):
    soc, words, on_chip, on_host = CASES[case]
    arguments = [*data, *words, *TWO_STEPS]
    on_cpu = losses(tmp_path / "cpu", *arguments, "backend=cpu", f"precision.arithmetic={on_host}")
    there = ["backend=ascend", "backend.software=true", f"precision.arithmetic={on_chip}"]
    on_npu = losses(tmp_path / "npu", *arguments, *there, SOC=soc)
    assert len(on_npu) == 2
    assert on_npu == pytest.approx(on_cpu, rel=2e-3)


def test_native_products_that_950_has_no_operator_for_are_refused(data, tmp_path):
    words = [*data, *LAYOUTS["one rank"], "precision=fp8_tensor_current", "precision.block=128"]
    command = [*COMMAND, *MODEL, *BATCH, *NO_MORE, *words, "precision.arithmetic=native", "backend=ascend"]
    command += ["backend.software=true", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 2, done.stdout + done.stderr
    for part in (
        "scaled_mm has none for this recipe (npu: ",
        "precision.arithmetic=emulate",
        "precision=mxfp8",
    ):
        assert part in done.stderr
