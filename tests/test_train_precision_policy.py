"""From the `precision` group to recipes, formats on the wire, kernels and the start-up table; and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from run_configs import TINY

from octofold.backends.base import Capabilities
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError
from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import E5M2, Format
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.parallel.transport import Transport
from octofold.train.build import fp8_workload
from octofold.train.models.decoder import Decoder
from octofold.train.precision.apply import apply_precision, fp8_states, slots
from octofold.train.precision.config import FP8, LossScaleConfig, OverrideConfig, PrecisionConfig, check
from octofold.train.precision.policy import plan_rows, recipe_for, require_arithmetic, transport_for

MODEL = replace(TINY, vocab_size=64, num_nextn_predict_layers=1, q_lora_rank=24)
PLAIN = Workload("cpu", torch.bfloat16, (64, 32))


def kernels() -> Kernels:
    return choose(KernelsConfig(), Workload("cpu", torch.bfloat16, formats=(Format((1, 128)),)))[0]


def model(precision: PrecisionConfig) -> Decoder:
    with torch.device("meta"):
        built = Decoder(MODEL, kernels())
        apply_precision(built, precision, kernels())
    return built


def test_by_default_what_deepseek_v3_has_in_fp8_is():
    """All linear layers, experts included; not embedding, gate, head and the projection of multi-token prediction."""
    built = model(PrecisionConfig("fp8_block"))
    in_fp8 = set(fp8_states(built))
    rest = {name for name, _, _ in slots(built)} - in_fp8
    assert rest == {"embed_tokens", "lm_head", "mtp.0.eh_proj"}
    assert {
        "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.experts.down_proj",
        "mtp.0.block.self_attn.o_proj",
    } <= in_fp8
    assert {"layers.0.mlp.gate_proj", "layers.2.mlp.shared_experts.down_proj", "layers.0.self_attn.kv_b_proj"} <= in_fp8
    assert not fp8_states(model(PrecisionConfig("bf16")))


def test_overrides_take_out_put_in_and_change():
    """In order, the later one wins; what an override leaves null stays."""
    precision = PrecisionConfig(
        "fp8_block",
        block=32,
        overrides=[
            OverrideConfig("layers.*.self_attn.*", name="bf16"),
            OverrideConfig("*.o_proj", name="mxfp8", gradient_fmt="e5m2"),
            OverrideConfig("lm_head", name="fp8_block"),
            OverrideConfig("embed_tokens", block=16),
            OverrideConfig("*.mlp.experts.*", scale_fmt="float", saved="bf16", accumulation="hopper", block=64),
        ],
    )
    check(precision)
    assert recipe_for(precision, "layers.0.self_attn.q_a_proj") is None
    o_proj, head = recipe_for(precision, "layers.0.self_attn.o_proj"), recipe_for(precision, "lm_head")
    assert o_proj is not None
    assert (o_proj.name, o_proj.gradient) == ("mxfp8", Format((1, 32), dtype=E5M2))
    assert head is not None
    assert head.weight.tile == (32, 32)
    assert recipe_for(precision, "embed_tokens") is None, "a block alone puts nothing into FP8"
    experts = recipe_for(precision, "layers.1.mlp.experts.down_proj")
    assert experts is not None
    assert (experts.weight.tile, experts.weight.scale, experts.saves_fp8) == ((64, 64), "float", False)
    assert experts.accumulation == "hopper"
    assert set(fp8_states(model(precision))) >= {"lm_head", "layers.3.self_attn.o_proj"}


def test_an_override_in_a_bf16_model():
    precision = PrecisionConfig("bf16", overrides=[OverrideConfig("layers.1.*", name="fp8_block")])
    assert precision.is_fp8
    assert {name.split(".")[1] for name in fp8_states(model(precision))} == {"1"}


def test_an_override_that_matches_nothing_is_refused():
    precision = PrecisionConfig("fp8_block", overrides=[OverrideConfig("layers.9.*", name="bf16")])
    with pytest.raises(ConfigError, match=r"(?s)overrides\[0\].match=layers.9.*matches some linear layer"):
        model(precision)


@pytest.mark.parametrize("name", FP8)
def test_kernels_are_chosen_for_every_format_of_the_run(name):
    precision = PrecisionConfig(name, overrides=[OverrideConfig("*.o_proj", name="mxfp8", accumulation="hopper")])
    workload = fp8_workload(PLAIN, precision, [module for module, _, _ in slots(model(precision))])
    for module in ("layers.0.mlp.up_proj", "layers.0.self_attn.o_proj"):
        recipe = recipe_for(precision, module)
        assert recipe is not None
        assert set(recipe.formats) <= set(workload.formats)
    assert workload.accumulation == "hopper"
    _, choices = choose(KernelsConfig(), workload)
    assert {choice.provider for choice in choices if choice.op.startswith("scaled_")} == {"reference"}


def test_kernels_are_chosen_by_the_modules_that_overrides_reach():
    """Not by the patterns: these match other names than their own, and overlap."""
    overrides = [
        OverrideConfig("*.o_proj", block=64),
        OverrideConfig("layers.[01].*", gradient_fmt="e5m2", accumulation="hopper"),
    ]
    precision = PrecisionConfig("fp8_block", overrides=overrides)
    workload = fp8_workload(PLAIN, precision, [module for module, _, _ in slots(model(precision))])
    assert Format((1, 64), dtype=E5M2) in workload.formats
    assert workload.accumulation == "hopper"
    check(precision)


@pytest.mark.parametrize("name", FP8)
def test_arithmetic_that_the_device_lacks_is_refused_with_the_ways_out(name):
    """What the device says of itself decides, and nothing takes the place of what was asked."""
    capabilities = CpuBackend().capabilities(0)
    with pytest.raises(ConfigError) as caught:
        require_arithmetic(PrecisionConfig(name), capabilities)
    message = str(caught.value)
    assert all(word in message for word in (name, "CPU", "arithmetic in FP8", "=emulate", "=storage"))
    for arithmetic in ("emulate", "storage"):
        require_arithmetic(PrecisionConfig(name, arithmetic=arithmetic), capabilities)
    require_arithmetic(PrecisionConfig("bf16"), capabilities)
    with pytest.raises(ConfigError):
        require_arithmetic(PrecisionConfig(overrides=[OverrideConfig("lm_head", name=name)]), capabilities)


def test_a_device_with_fp8_has_no_microscaling_by_that():
    hopper = Capabilities("a Hopper GPU", bf16=True, fp8=True, memory_bytes=1)
    require_arithmetic(PrecisionConfig("fp8_block"), hopper)
    with pytest.raises(ConfigError, match="MX"):
        require_arithmetic(PrecisionConfig("mxfp8"), hopper)


def test_what_travels_to_experts():
    experts = "layers.1.mlp.experts"
    assert transport_for(PrecisionConfig("bf16"), experts) == Transport()
    block = transport_for(PrecisionConfig("fp8_block", block=64, scale_fmt="float", gradient_fmt="e5m2"), experts)
    assert block == Transport(Format((1, 64)), Format((1, 64), dtype=E5M2)), "powers of two, whatever the products use"
    assert transport_for(PrecisionConfig("fp8_tensor_current"), experts).dispatch == Format((1, 128))
    assert transport_for(PrecisionConfig("mxfp8"), experts).dispatch == Format((1, 32))
    assert transport_for(PrecisionConfig("fp8_block", dispatch="bf16"), experts) == Transport()
    assert transport_for(PrecisionConfig("bf16", dispatch="fp8"), experts).dispatch == Format((1, 128))
    out = PrecisionConfig("fp8_block", overrides=[OverrideConfig("*.experts.*", name="bf16")])
    assert transport_for(out, experts) == Transport()


def test_the_table_tells_weights_products_what_is_kept_and_sent():
    precision = PrecisionConfig(
        "fp8_block", arithmetic="emulate", overrides=[OverrideConfig("layers.0.self_attn.*", name="bf16")]
    )
    names = [name for name, _, _ in slots(model(precision))]
    rows = plan_rows(precision, names, compute_dtype=torch.bfloat16, sends=True)
    assert rows["head"] == rows["embedding"] == "BF16"
    assert "emulated products E4M3 1x128 2^n x E4M3 128x128 2^n; saves E4M3 1x128 2^n" in rows["routed experts"]
    assert "5 x BF16" in rows["attention projections"]
    assert "20 x fp8_block" in rows["attention projections"]
    assert rows["experts' exchange"].startswith("tokens to experts E4M3 1x128 2^n, back BF16")
    assert "FP32" in rows["gate, norms, attention core"]
    assert rows["weights gathered, gradients summed"] == "BF16, FP32"
    assert "kept in FP8" in rows["shared experts"]
    stored = plan_rows(replace(precision, arithmetic="storage"), names, compute_dtype=torch.bfloat16, sends=False)
    assert "products BF16; saves E4M3" in stored["dense feed-forward"]
    assert "experts' exchange" not in stored


@pytest.mark.parametrize(
    ("changes", "offender"),
    [
        ({"name": "fp8"}, "precision.name=fp8"),
        ({"arithmetic": "fast"}, "precision.arithmetic=fast"),
        ({"block": 24}, "precision.block=24"),
        ({"block": 0}, "precision.block=0"),
        ({"scale_fmt": "e8m0"}, "precision.scale_fmt=e8m0"),
        ({"gradient_fmt": "e3m4"}, "precision.gradient_fmt=e3m4"),
        ({"saved": "int8"}, "precision.saved=int8"),
        ({"dispatch": "int8"}, "precision.dispatch=int8"),
        ({"accumulation": "fp16"}, "precision.accumulation=fp16"),
        ({"name": "fp64", "dispatch": "fp8"}, "precision.name=fp64 precision.dispatch=fp8"),
        ({"amax_history": 0}, "precision.amax_history=0"),
        ({"watch_every": -1}, "precision.watch_every=-1"),
        ({"overrides": [OverrideConfig("", name="bf16")]}, "precision.overrides[0].match"),
        ({"overrides": [OverrideConfig("*", name="fp64")]}, "precision.overrides[0].name=fp64"),
        ({"overrides": [OverrideConfig("layers.[01].*", block=7)]}, "precision.overrides[0].block=7"),
        ({"overrides": [OverrideConfig("layers.[01].*", scale_fmt="e4m3")]}, "precision.overrides[0].scale_fmt=e4m3"),
        ({"name": "mxfp8", "block": 64}, "precision.name=mxfp8 precision.block=64"),
        (
            {"overrides": [OverrideConfig("*", name="mxfp8", scale_fmt="float")]},
            "precision.overrides[0].scale_fmt=float",
        ),
        ({"arithmetic": "storage", "accumulation": "hopper"}, "precision.arithmetic=storage"),
        ({"overrides": [OverrideConfig("*", block=7)]}, "precision.overrides[0].block=7"),
        ({"name": "fp32", "overrides": [OverrideConfig("*", name="mxfp8")]}, "precision.name=fp32"),
        ({"loss_scale": LossScaleConfig("dynamik")}, "precision.loss_scale.kind=dynamik"),
        ({"loss_scale": LossScaleConfig(init=0.0)}, "precision.loss_scale.init=0.0"),
        ({"loss_scale": LossScaleConfig(init=float("nan"))}, "precision.loss_scale.init=nan"),
        ({"loss_scale": LossScaleConfig(backoff=1.0)}, "precision.loss_scale.backoff=1.0"),
        ({"loss_scale": LossScaleConfig(growth_interval=0)}, "precision.loss_scale.growth_interval=0"),
        ({"loss_scale": LossScaleConfig(init=2.0, least=4.0)}, "precision.loss_scale.init=2"),
    ],
)
def test_what_cannot_work_is_named_before_anything_starts(changes: dict[str, Any], offender: str):
    with pytest.raises(ConfigError) as caught:
        check(PrecisionConfig(**{"name": "fp8_block", **changes}))
    message = str(caught.value)
    assert offender in message
    assert "rule:" in message
    assert "remedy:" in message
