"""Operations are those that torch counts in a training step, each at the peak of its arithmetic; MFU is ideal time ÷
time taken."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import SMALL, positions_of, tokens_of
from torch.utils.flop_counter import FlopCounterMode

from octofold.backends.config import BackendConfig, check
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError
from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.train.flops import FORWARD_AND_BACKWARD, Utilisation, flops_a_token, forward_products, known_peaks
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder
from octofold.train.models.init import initialise
from octofold.train.precision.apply import apply_precision, fp8_states
from octofold.train.precision.config import OverrideConfig, PrecisionConfig

LENGTH, SEQUENCES = 12, 3
TOKENS = LENGTH * SEQUENCES
MODELS = {
    "dense queries": SMALL,
    "low-rank queries, two depths": replace(SMALL, q_lora_rank=7, num_nextn_predict_layers=2),
    "dense": replace(SMALL, first_k_dense_replace=2, num_nextn_predict_layers=1),
    "no shared experts": replace(SMALL, n_shared_experts=0, first_k_dense_replace=0, num_experts_per_tok=3),
    "tied": replace(SMALL, tie_word_embeddings=True),
}


def kernels() -> Kernels:
    """The plainest: what a product is called does not depend on the machine."""
    names = ("attention", "grouped_mm", "rms_norm", "swiglu", "permute", "unpermute")
    return choose(KernelsConfig(**dict.fromkeys(names, "reference")), Workload("cpu", torch.bfloat16))[0]


def bf16_decoder(config: ModelConfig) -> Decoder:
    model = Decoder(config, kernels()).bfloat16()
    initialise(model, seed=0, std=config.initializer_range, stacked=model.plan().experts)
    return model


def counted(config: ModelConfig) -> tuple[int, int]:
    """Operations of a forward and backward pass by torch's count: of products with weights, of the attention core."""
    model, tokens = bf16_decoder(config), tokens_of(config, SEQUENCES, LENGTH)
    ahead = [tokens] * config.num_nextn_predict_layers
    with FlopCounterMode(display=False) as counter:
        sum(x.float().square().sum() for x in model(tokens, positions_of(tokens), ahead=ahead)).backward()
    # Products of stacks (bmm): attention alone, besides the weighted sums of experts, which the reference does without.
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert by_op.keys() == {"aten.mm", "aten.bmm"}
    return by_op["aten.mm"], by_op["aten.bmm"]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_operations_are_those_that_torch_counts(config):
    found = dict(forward_products(config, LENGTH))
    core = {name: flops for name, flops in found.items() if name.endswith("self_attn")}
    weights, attention = counted(config)
    assert FORWARD_AND_BACKWARD * TOKENS * (sum(found.values()) - sum(core.values())) == weights
    # The reference multiplies all S·S pairs of positions, of which S·(S + 1) / 2 are visible.
    visible = (LENGTH + 1) / 2 / LENGTH
    assert FORWARD_AND_BACKWARD * TOKENS * sum(core.values()) == pytest.approx(attention * visible, rel=1e-12)


def test_names_are_those_of_the_modules_with_weights():
    config = MODELS["low-rank queries, two depths"]
    model = bf16_decoder(config)
    names = {name for name, _ in forward_products(config, LENGTH)}
    weights = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() > 1}
    cores = {name for name, _ in model.named_modules() if name.endswith("self_attn")}
    assert names == weights - {"embed_tokens"} | cores
    apply_precision(model, PrecisionConfig("fp8_block", overrides=[OverrideConfig("lm_head", "fp8_block")]), kernels())
    in_bf16 = {name for name in names if name.endswith(("gate", "self_attn", "eh_proj"))}
    assert fp8_states(model).keys() == names - in_bf16, "the policy calls them by the same names"


def test_operations_of_deepseek_v3():
    """Published: 37B parameters a token are active, so 6 · 37B operations a token without attention."""
    import yaml

    with (Path(__file__).parents[1] / "configs/model/deepseek_v3.yaml").open(encoding="utf-8") as file:
        values = {k: v for k, v in yaml.safe_load(file).items() if k not in ("balance", "mtp", "rope_scaling")}
    config = ModelConfig(**values | {"num_nextn_predict_layers": 0})
    products = dict(forward_products(config, 4096))
    core = sum(flops for name, flops in products.items() if name.endswith("self_attn"))
    without_core = FORWARD_AND_BACKWARD * (sum(products.values()) - core)
    embedding = 129280 * 7168
    assert without_core == pytest.approx(6 * (37.6e9 - embedding), rel=0.005)
    assert FORWARD_AND_BACKWARD * core == pytest.approx(3 * 61 * 4097 * 128 * (192 + 128))


def test_each_module_counts_where_it_runs():
    is_fp8 = {"layers.1.mlp.experts.down_proj"}.__contains__
    of_kinds = flops_a_token(SMALL, LENGTH, is_fp8)
    experts = FORWARD_AND_BACKWARD * 2 * SMALL.num_experts_per_tok * SMALL.moe_intermediate_size * SMALL.hidden_size
    assert of_kinds["fp8"] == experts
    assert of_kinds["bf16"] + experts == pytest.approx(sum(flops_a_token(SMALL, LENGTH, lambda _: False).values()))
    assert flops_a_token(SMALL, LENGTH, lambda _: False, "fp64").keys() == {"fp64"}


def test_utilisation_takes_each_product_at_its_own_peak():
    flops, peaks = {"bf16": 2e12, "fp8": 6e12}, {"bf16": 1e12, "fp8": 2e12}
    assert Utilisation(flops, peaks).metrics(10.0) == pytest.approx({"model_tflops": 0.8, "mfu": 0.5})
    assert Utilisation({"bf16": 8e12}, peaks).metrics(10.0)["mfu"] == pytest.approx(0.8), "the same work, slower"
    assert Utilisation(flops, {"bf16": 1e12}).metrics(10.0).keys() == {"model_tflops"}, "a peak is not known"
    assert Utilisation({"fp64": 1e12}, peaks).metrics(1.0) == {"model_tflops": 1.0}


def test_peaks_are_what_the_user_says_and_else_what_is_known():
    device = {"bf16": 989e12, "fp8": 1979e12}
    assert known_peaks(device, {"bf16": 0.0, "fp8": 0.0}) == device
    assert known_peaks(device, {"bf16": 400.0, "fp8": 0.0}) == {"bf16": 400e12, "fp8": 1979e12}
    assert known_peaks(CpuBackend().capabilities(0).peak_flops, {"bf16": 0.0, "fp8": 0.0}) == {}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_peak_is_a_number(value):
    with pytest.raises(ConfigError, match=r"^backend\.peak_tflops_fp8="):
        check(BackendConfig(peak_tflops_fp8=value), 1)
