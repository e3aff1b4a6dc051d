"""Dimensions that cannot be built are refused by name; architectures are found by name."""

import math
from dataclasses import replace

import pytest

from octofold.backends.errors import ConfigError
from octofold.train.models.config import BalanceConfig, ModelConfig, MtpConfig, RopeScalingConfig, check
from octofold.train.models.decoder import Decoder
from octofold.train.models.registry import load_architecture


def test_the_defaults_can_be_built():
    check(ModelConfig())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 0}, "model.hidden_size=0\n  rule:   must be at least 1"),
        ({"num_attention_heads": -2}, "model.num_attention_heads=-2\n"),
        ({"qk_rope_head_dim": 5}, "model.qk_rope_head_dim=5\n  rule:   rotary position embedding turns pairs"),
        (
            {"num_experts_per_tok": 9, "n_routed_experts": 8},
            "model.num_experts_per_tok=9 model.n_routed_experts=8\n  rule:   a token cannot choose more experts",
        ),
        (
            {"first_k_dense_replace": 7, "num_hidden_layers": 6},
            "model.first_k_dense_replace=7 model.num_hidden_layers=6\n  rule:   dense layers are counted among all",
        ),
        ({"scoring_func": "sofmax"}, "model.scoring_func=sofmax\n"),
        (
            {"scoring_func": "softmax"},
            "model.scoring_func=softmax model.topk_method=noaux_tc\n  rule:   a softmax gate chooses by: greedy, group",
        ),
        (
            {"n_routed_experts": 10, "n_group": 4},
            "model.n_routed_experts=10 model.n_group=4\n  rule:   groups divide the experts evenly",
        ),
        ({"n_group": 4, "topk_group": 5}, "model.topk_group=5 model.n_group=4\n"),
        (
            {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 3},
            "model.n_routed_experts=16 model.n_group=8 model.topk_group=1 model.num_experts_per_tok=3\n"
            "  rule:   a token chooses among the 2 experts",
        ),
        (
            {"n_group": 16, "topk_group": 8},
            "model.n_routed_experts=16 model.n_group=16\n  rule:   noaux_tc scores a group by its two best",
        ),
        (
            {"scoring_func": "softmax", "topk_method": "greedy"},
            "model.topk_method=greedy model.balance.bias_update_rate=0.001\n  rule:   only noaux_tc",
        ),
        ({"balance": BalanceConfig(device_loss=0.05)}, "model.balance.device_loss=0.05 model.n_group=1\n"),
        ({"balance": BalanceConfig(z_loss=math.inf)}, "model.balance.z_loss=inf\n"),
        ({"balance": BalanceConfig(bias_update_until=2.0)}, "model.balance.bias_update_until=2.0\n"),
        ({"mtp": MtpConfig(loss_weight=-1.0)}, "model.mtp.loss_weight=-1.0\n"),
        ({"mtp": MtpConfig(late_from=-0.1)}, "model.mtp.late_from=-0.1\n"),
        ({"rope_scaling": RopeScalingConfig(type="linear")}, "model.rope_scaling.type=linear\n"),
        ({"rope_scaling": RopeScalingConfig(type="yarn", factor=0.5)}, "model.rope_scaling.factor=0.5\n"),
        ({"rope_scaling": RopeScalingConfig(type="yarn"), "rope_theta": 1.0}, "model.rope_theta=1.0\n"),
        ({"num_nextn_predict_layers": -1}, "model.num_nextn_predict_layers=-1\n"),
    ],
)
def test_refusals(changed, message):
    with pytest.raises(ConfigError) as caught:
        check(replace(ModelConfig(), **changed))
    assert str(caught.value).startswith(message)
    assert caught.value.remedy


def test_architectures_by_name():
    assert load_architecture("deepseek") is Decoder
    assert load_architecture("octofold.train.models.decoder:Decoder") is Decoder
    with pytest.raises(ConfigError) as caught:
        load_architecture("deepsek")
    assert caught.value.remedy == "model.architecture=deepseek"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("octofold.train.models.decoder:DecoderLayer", "a class derived from"),
        ("octofold.train.models.decoder:rope_tables", "a class derived from"),
        ("octofold.train.models.decoder:Encoder", "octofold.train.models.decoder has no Encoder"),
        ("no_such_package:Model", "no module named no_such_package"),
    ],
)
def test_architectures_that_are_none(name, rule):
    with pytest.raises(ConfigError, match=rule):
        load_architecture(name)
