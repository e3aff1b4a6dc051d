"""The decoder against transformers' DeepSeek-V2 and V3 in FP32: logits, and the gradient of every parameter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peers import mtp_peer_of, named, ours_from, peer_of
from tiny_models import SMALL, positions_of, tokens_of

from octofold.backends.errors import ConfigError
from octofold.train.models.config import BalanceConfig, ModelConfig, RopeScalingConfig, check

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # shared experts of width 0

TOLERANCE = 1e-4
"""FP32 keeps 7 digits; values here are below 10 and pass a few dozen sums of at most 100 terms."""

UNBALANCED = BalanceConfig(bias_update_rate=0.0)
V2 = replace(
    SMALL,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    balance=UNBALANCED,
)
YARN = RopeScalingConfig("yarn", factor=40.0, original_max_position_embeddings=48, mscale=1.0, mscale_all_dim=1.0)


def assert_parity(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> None:
    check(config)
    peer = peer_of(config, seed)
    depths = config.num_nextn_predict_layers
    mtp = mtp_peer_of(peer, config, seed) if depths else None
    model = ours_from(peer, config, mtp)
    tokens_BS, positions_BS = (
        tokens_of(config, sequences, length, seed),
        positions_of(tokens_of(config, sequences, length)),
    )
    ahead = [tokens_of(config, sequences, length, seed + 2 + depth) for depth in range(depths)]
    logits = model(tokens_BS, positions_BS, ahead=ahead)
    hidden_BSD = peer.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    expected = [peer.lm_head(hidden_BSD)]
    for depth, next_BS in enumerate(ahead):
        hidden_BSD = mtp.forward_layer(depth, hidden_BSD, positions_BS, None, input_ids=next_BS)
        expected.append(peer.lm_head(hidden_BSD))
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    labels = tokens_of(config, sequences, length, seed + 1).flatten()
    for predictions in (logits, expected):
        sum(F.cross_entropy(x.flatten(0, 1), labels) for x in predictions).backward()
    assert_gradients(model, named(peer, mtp))


def assert_gradients(model: torch.nn.Module, expected: dict[str, torch.nn.Parameter]) -> None:
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # An expert that no token chose: the library leaves nothing, we leave zeros.
        found = expected[name].grad
        gradient = torch.zeros_like(parameter) if found is None else found.view_as(parameter)
        assert parameter.grad is not None, name
        assert (parameter.grad - gradient).abs().max() <= TOLERANCE, name


CASES: list[tuple[ModelConfig, dict[str, Any]]] = [
    (SMALL, {}),
    (SMALL, {"q_lora_rank": 7}),
    (SMALL, {"n_shared_experts": 2, "first_k_dense_replace": 0}),
    (SMALL, {"n_shared_experts": 0}),
    (SMALL, {"first_k_dense_replace": 2}),
    (SMALL, {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    (SMALL, {"num_experts_per_tok": 1, "rope_theta": 500.0}),
    (SMALL, {"num_experts_per_tok": 4}),
    (SMALL, {"tie_word_embeddings": True}),
    (SMALL, {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    (SMALL, {"rope_scaling": YARN}),
    (SMALL, {"rope_scaling": replace(YARN, mscale=0.707, mscale_all_dim=1.0)}),
    (SMALL, {"rope_scaling": replace(YARN, mscale_all_dim=0.0)}),
    (SMALL, {"num_nextn_predict_layers": 1, "rope_scaling": YARN}),
    (SMALL, {"num_nextn_predict_layers": 2, "first_k_dense_replace": 2, "tie_word_embeddings": True}),
    (V2, {}),
    (V2, {"q_lora_rank": 7, "routed_scaling_factor": 16.0}),
    (V2, {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
    (V2, {"rope_scaling": replace(YARN, mscale=0.707, mscale_all_dim=0.707)}),
    (V2, {"n_shared_experts": 0, "first_k_dense_replace": 0, "tie_word_embeddings": True}),
]


def _label(changed: dict[str, Any]) -> str:
    shown = {k: v.type if isinstance(v, RopeScalingConfig) else v for k, v in changed.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items()) or "small"


@pytest.mark.parametrize(
    ("config", "changed"), CASES, ids=[f"{c.scoring_func} {_label(changed)}" for c, changed in CASES]
)
def test_parity(config, changed):
    assert_parity(replace(config, **changed), sequences=2, length=33)


yarns = st.builds(
    RopeScalingConfig,
    type=st.sampled_from(["default", "yarn"]),
    factor=st.sampled_from([1.0, 2.0, 40.0]),
    original_max_position_embeddings=st.integers(8, 64),
    beta_fast=st.sampled_from([4.0, 32.0]),
    mscale=st.sampled_from([0.707, 1.0]),
    mscale_all_dim=st.sampled_from([0.0, 0.707, 1.0]),
)


@st.composite
def configurations(draw: st.DrawFn, gate: str) -> ModelConfig:
    groups, group_size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    # The library's V2 takes only hidden widths that the heads divide, and rotary parts that begin at an even place.
    heads, even = draw(st.integers(1, 3)), 2 if gate == "softmax" else 1
    method = draw(st.sampled_from(["greedy", "group_limited_greedy"])) if gate == "softmax" else "noaux_tc"
    return replace(
        SMALL,
        vocab_size=draw(st.integers(2, 70)),
        # A norm over one or two numbers multiplies gradients, and with them FP32's rounding, by thousands.
        hidden_size=draw(st.integers(8, 40)) if even == 1 else heads * draw(st.integers(8, 13)),
        num_hidden_layers=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, 1)),
        num_attention_heads=heads,
        q_lora_rank=draw(st.none() | st.integers(4, 12)),
        kv_lora_rank=even * draw(st.integers(4, 10)),
        qk_nope_head_dim=even * draw(st.integers(1, 6)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 12)),
        rope_scaling=draw(yarns),
        n_routed_experts=groups * group_size,
        n_group=groups,
        topk_group=topk_group,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, min(4, topk_group * group_size))),
        moe_intermediate_size=draw(st.integers(1, 20)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        scoring_func=gate,
        topk_method=method,
        # The library's V2 never normalises.
        norm_topk_prob=gate == "sigmoid" and draw(st.booleans()),
        balance=UNBALANCED,
        num_nextn_predict_layers=draw(st.integers(0, 1)) if gate == "sigmoid" else 0,
    )


@settings(max_examples=120)
@given(
    config=configurations("sigmoid"), sequences=st.integers(1, 2), length=st.integers(1, 260), seed=st.integers(0, 99)
)
def test_parity_with_v3_of_any_dimensions(config, sequences, length, seed):
    assert_parity(config, sequences, length, seed)


@settings(max_examples=120)
@given(
    config=configurations("softmax"), sequences=st.integers(1, 2), length=st.integers(1, 260), seed=st.integers(0, 99)
)
def test_parity_with_v2_of_any_dimensions(config, sequences, length, seed):
    assert_parity(config, sequences, length, seed)


@given(experts=st.integers(2, 24), groups=st.integers(2, 24))
def test_groups_that_do_not_divide_the_experts_are_refused(experts, groups):
    assume(experts % groups)
    with pytest.raises(ConfigError, match=rf"^model.n_routed_experts={experts} model.n_group={groups}\n"):
        check(replace(SMALL, n_routed_experts=experts, n_group=groups))
