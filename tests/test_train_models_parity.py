"""The decoder against transformers' DeepseekV3ForCausalLM in FP32: logits, and the gradient of every parameter."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALL, kernels_for, positions_of, tokens_of

from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder

TOLERANCE = 1e-4
"""FP32 keeps 7 digits; values here are below 10 and pass a few dozen sums of at most 100 terms."""


@cache
def library() -> Any:
    """Loaded by the first test that needs it: it takes seconds."""
    import transformers

    return transformers


def peer_of(config: ModelConfig, seed: int) -> Any:
    """The library's model of the same dimensions with fresh weights, norms and expert biases included."""
    shared = "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size rms_norm_eps "
    shared += "tie_word_embeddings num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    shared += "v_head_dim n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    shared += "routed_scaling_factor"
    peer_config = library().DeepseekV3Config(
        **{name: getattr(config, name) for name in shared.split()},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    peer = library().DeepseekV3ForCausalLM(peer_config).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(peer.state_dict().items()):
            spread = 0.1 if "norm" in name else config.initializer_range
            tensor.normal_(float("norm" in name), spread, generator=generator)
    return peer


def ours_from(peer: Any, config: ModelConfig) -> Decoder:
    """Our model with the library's weights, under the library's names less `model.`."""
    model = Decoder(config, kernels_for(config, torch.float32))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in peer.state_dict().items()})
    return model


def assert_parity(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> None:
    peer = peer_of(config, seed)
    model = ours_from(peer, config)
    tokens_BS = tokens_of(config, sequences, length, seed)
    logits_BSV = model(tokens_BS, positions_of(tokens_BS))
    expected_BSV = peer(input_ids=tokens_BS, use_cache=False).logits
    torch.testing.assert_close(logits_BSV, expected_BSV, rtol=0, atol=TOLERANCE)
    labels = tokens_of(config, sequences, length, seed + 1).flatten()
    for logits in (logits_BSV, expected_BSV):
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
    expected = {name.removeprefix("model."): parameter for name, parameter in peer.named_parameters()}
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # An expert that no token chose: the library leaves nothing, we leave zeros.
        gradient = expected[name].grad if expected[name].grad is not None else torch.zeros_like(parameter)
        assert parameter.grad is not None, name
        assert (parameter.grad - gradient).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"q_lora_rank": 7},
        {"n_shared_experts": 2, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"num_experts_per_tok": 1, "rope_theta": 500.0},
        {"num_experts_per_tok": 4},
        {"tie_word_embeddings": True},
    ],
    ids=lambda changed: " ".join(f"{name}={value}" for name, value in changed.items()) or "small",
)
def test_parity(changed):
    assert_parity(replace(SMALL, **changed), sequences=2, length=33)


configurations = st.builds(
    replace,
    st.just(SMALL),
    vocab_size=st.integers(2, 70),
    hidden_size=st.integers(1, 40),
    num_hidden_layers=st.integers(1, 3),
    first_k_dense_replace=st.integers(0, 1),
    num_attention_heads=st.integers(1, 3),
    q_lora_rank=st.one_of(st.none(), st.integers(1, 12)),
    kv_lora_rank=st.integers(1, 16),
    qk_nope_head_dim=st.integers(1, 9),
    qk_rope_head_dim=st.integers(1, 4).map(lambda half: 2 * half),
    v_head_dim=st.integers(1, 12),
    n_routed_experts=st.integers(2, 8),
    n_shared_experts=st.integers(1, 2),
    num_experts_per_tok=st.integers(1, 2),
    moe_intermediate_size=st.integers(1, 20),
    routed_scaling_factor=st.sampled_from([1.0, 2.5]),
)


@settings(max_examples=40)
@given(config=configurations, sequences=st.integers(1, 2), length=st.integers(1, 130), seed=st.integers(0, 99))
def test_parity_of_any_dimensions(config, sequences, length, seed):
    assert_parity(config, sequences, length, seed)
