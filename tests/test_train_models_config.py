"""Dimensions that cannot be built are refused by name; architectures are found by name."""

from dataclasses import replace

import pytest

from octofold.backends.errors import ConfigError
from octofold.train.models.config import ModelConfig, check
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
        ({"scoring_func": "softmax"}, "model.scoring_func=softmax\n"),
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
