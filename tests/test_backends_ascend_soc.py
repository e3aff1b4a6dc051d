"""What each Ascend chip can do, and what a run in FP8 makes of it, asked through a backend that reports the chip."""

import subprocess
import sys

import pytest
from run_configs import TINY, tiny_run, write_corpus

from octofold.backends.ascend_soc import CHIPS, capabilities, chip_of
from octofold.backends.base import Capabilities
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError, UserError
from octofold.backends.process_group import RankInfo
from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import Choice
from octofold.train.build import draft_fitting
from octofold.train.optim.adamw import require_moments
from octofold.train.precision.config import PrecisionConfig
from octofold.train.precision.policy import require_arithmetic, require_products

A2 = ["Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1"]
A3 = [f"Ascend910_{bin_}" for bin_ in ("9391", "9392", "9381", "9382", "9372", "9362", "9363")]
A5 = ["Ascend950PR_9599", "Ascend950PR_957b", "Ascend950PR_950z", "Ascend950DT_9582x", "Ascend950DT_95A1"]


@pytest.mark.parametrize("name", A2 + A3)
def test_a2_and_a3_multiply_bf16_and_int8_but_no_fp8(name):
    able = capabilities(name, 64 << 30)
    assert able.native() == ["BF16", "INT8"]
    assert able.memory_bytes == 64 << 30
    assert able.device_name == f"Ascend {'910B' if name in A2 else '910C'} ({name})"


@pytest.mark.parametrize("name", A5)
def test_950_multiplies_fp8_mxfp8_and_hif8(name):
    able = capabilities(name, 1)
    assert able.native() == ["BF16", "INT8", "FP8", "MXFP8", "HiF8"]
    assert able.peak_flops == {"bf16": 432e12 if "PR" in name else 486e12}


def test_a_peak_belongs_to_the_bin():
    assert capabilities("Ascend910B3", 1).peak_flops == {"bf16": 294.9e12}
    assert capabilities("Ascend910_9381", 1).peak_flops is None


@pytest.mark.parametrize("name", ["Ascend910B", "Ascend910A", "Ascend310P3", "Ascend910_9999", "NVIDIA H100", ""])
def test_an_unknown_name_is_answered_with_the_known(name):
    with pytest.raises(UserError) as caught:
        chip_of(name)
    assert name in str(caught.value)
    assert all(chip.shown in str(caught.value) for chip in CHIPS)


class NamedDevice(CpuBackend):
    """Computes on the CPU and says of itself what the table says of a chip."""

    def __init__(self, soc_name: str) -> None:
        self.soc_name = soc_name

    def capabilities(self, local_rank: int) -> Capabilities:
        return capabilities(self.soc_name, 64 << 30)


def drafted(soc_name, tmp_path, **precision):
    config = tiny_run(write_corpus(tmp_path), precision=precision)
    return draft_fitting(config, NamedDevice(soc_name), RankInfo(), TINY.vocab_size)


@pytest.mark.parametrize("soc_name", ["Ascend910B2", "Ascend910_9392"])
@pytest.mark.parametrize("recipe", ["fp8_block", "mxfp8", "fp8_tensor_current"])
def test_fp8_on_a_chip_without_it_stops_with_the_ways_out(soc_name, recipe, tmp_path):
    with pytest.raises(ConfigError) as caught:
        drafted(soc_name, tmp_path, name=recipe)
    message = str(caught.value)
    assert f"({soc_name}) has no arithmetic in FP8 but in BF16, INT8" in message
    for way_out in (
        "precision.arithmetic=storage",
        "precision.arithmetic=emulate",
        "precision=bf16",
        "precision.dispatch=fp8",
    ):
        assert way_out in message


@pytest.mark.parametrize("arithmetic", ["storage", "emulate"])
def test_a_chip_without_fp8_keeps_sends_or_emulates_it(arithmetic):
    assert refusal(PrecisionConfig("fp8_block", arithmetic=arithmetic), "Ascend910_9392") is None


@pytest.mark.parametrize("recipe", ["fp8_block", "mxfp8", "bf16"])
def test_950_takes_every_recipe(recipe):
    assert refusal(PrecisionConfig(recipe), "Ascend950DT_9582") is None


@pytest.mark.parametrize("recipe", ["fp8_tensor_current", "fp8_tensor_delayed", "fp8_block"])
def test_a_product_without_a_native_provider_is_refused_unless_asked_for(recipe):
    """Such as scales in FP32 on 950, which `bytes` would decode."""
    choices = [Choice("scaled_mm", "bytes", {"npu": "powers of two alone"})]
    with pytest.raises(ConfigError) as caught:
        require_products(PrecisionConfig(recipe), KernelsConfig(), choices)
    for part in ("scaled_mm", "npu: powers of two alone", "precision.arithmetic=emulate", "precision=mxfp8"):
        assert part in str(caught.value)
    require_products(PrecisionConfig(recipe), KernelsConfig(scaled_mm="bytes"), choices)
    require_products(PrecisionConfig(recipe, arithmetic="emulate"), KernelsConfig(), choices)
    # Weight gradients of experts are told in the start-up table.
    native = [Choice("scaled_mm", "npu", {}), Choice("scaled_grouped_inner_mm", "bytes", {})]
    require_products(PrecisionConfig(recipe), KernelsConfig(), native)


@pytest.mark.parametrize("soc_name", ["Ascend910B2", "Ascend910_9392"])
def test_moments_in_fp8_are_for_chips_that_cast_to_it(soc_name, tmp_path):
    config = tiny_run(write_corpus(tmp_path), precision={"name": "bf16"}, optim={"moments": "fp8"})
    with pytest.raises(ConfigError, match=rf"(?s)moments=fp8\n.*{soc_name}.*remedy: optim.moments=bf16"):
        draft_fitting(config, NamedDevice(soc_name), RankInfo(), TINY.vocab_size)
    require_moments(config.optim, capabilities("Ascend950DT_9582", 1))


def refusal(precision, soc_name):
    """What a recipe is refused with on a chip; None where it is taken."""
    try:
        require_arithmetic(precision, capabilities(soc_name, 1))
    except ConfigError as error:
        return str(error)
    return None


def test_the_table_needs_no_torch():
    code = "import sys, octofold.backends.ascend_soc; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
