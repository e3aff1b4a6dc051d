"""Generation: absorbed attention over cached latents equals the full forward pass, and greedy text is transformers'."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import ours_from, peer_of
from test_train_models_parity import V2, YARN, configurations
from tiny_models import SMALL, decoder, positions_of, tokens_of

from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.process_group import RankInfo, joined
from octofold.train.models.attention import LatentCache
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder
from octofold.train.sampling import generate_ids


def in_pieces(model: Decoder, tokens_BS: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits of the whole, fed piece by piece."""
    cache = LatentCache(model.config.num_hidden_layers, capacity=sum(pieces))
    positions_BS = positions_of(tokens_BS)
    logits = [
        model(tokens, positions, cache=cache)
        for tokens, positions in zip(tokens_BS.split(pieces, 1), positions_BS.split(pieces, 1), strict=True)
    ]
    assert cache.length == tokens_BS.shape[1]
    return torch.cat(logits, dim=1)


@settings(max_examples=40)
@given(
    config=st.one_of(configurations("sigmoid"), configurations("softmax")),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    sequences=st.integers(1, 3),
)
@torch.no_grad()
def test_absorbed_equals_the_full_forward_pass(config, pieces, sequences):
    model = decoder(config).eval()
    tokens_BS = tokens_of(config, sequences, sum(pieces))
    expected = model(tokens_BS, positions_of(tokens_BS))
    for split in (pieces, [sum(pieces)], [1] * sum(pieces)):
        torch.testing.assert_close(in_pieces(model, tokens_BS, split), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_in_lower_precision(dtype, tolerance):
    # Without experts: a choice between two that tie may fall otherwise in BF16, which is no error.
    config = replace(SMALL, q_lora_rank=12, rope_scaling=YARN, first_k_dense_replace=2)
    model = decoder(config, dtype).eval()
    tokens_BS = tokens_of(config, 2, 70)
    expected = model(tokens_BS, positions_of(tokens_BS))
    error = in_pieces(model, tokens_BS, [64, *[1] * 6]).double() - expected.double()
    assert error.norm() < tolerance * expected.double().norm()


@torch.no_grad()
def test_the_cache_holds_latents_only():
    config = replace(SMALL, num_hidden_layers=3, num_nextn_predict_layers=1)
    model, cache = decoder(config, torch.float32).eval(), LatentCache(3, capacity=40)
    tokens_BS = tokens_of(config, 2, 10)
    model(tokens_BS, positions_of(tokens_BS), cache=cache)
    assert cache.size_bytes == 3 * 2 * 40 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    with pytest.raises(AssertionError, match="full"):
        model(tokens_of(config, 2, 31), positions_of(tokens_of(config, 2, 31)), cache=cache)


@pytest.fixture(scope="module", autouse=True)
def world() -> Any:
    """Ranks agree on each token, so there is a world, of one."""
    with joined(CpuBackend(), BackendConfig(threads=1), RankInfo()):
        yield


WIDE: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.5}
"""Wide enough that no two logits tie."""
GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, **WIDE),
        replace(SMALL, **WIDE, q_lora_rank=7, rope_scaling=YARN, **GROUPS),
        replace(V2, **WIDE, rope_scaling=YARN),
        replace(
            V2, **WIDE, q_lora_rank=7, n_routed_experts=8, n_group=4, topk_group=2, topk_method="group_limited_greedy"
        ),
    ],
    ids=["V3", "V3 groups query-rank YaRN", "V2 YaRN", "V2 groups query-rank"],
)
def test_greedy_text_is_transformers(config: ModelConfig, seed: int):
    peer = peer_of(config, seed).eval()
    prompt = tokens_of(config, 1, 9, seed)
    settings: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = peer.generate(prompt, max_new_tokens=90, eos_token_id=None, **settings)[0, 9:].tolist()
    model = ours_from(peer, config)
    common: dict[str, Any] = {"context": 200, "vocab_size": 300, "temperature": 0.0, "top_k": 0, "seed": 0}
    ours = generate_ids(model, prompt[0].tolist(), tokens=90, eos_id=None, device=torch.device("cpu"), **common)
    assert ours == expected
    # The first token that has not occurred before becomes the end of text.
    last = next(i for i in range(5, 90) if expected[i] not in expected[:i])
    ended = peer.generate(prompt, max_new_tokens=90, eos_token_id=expected[last], **settings)[0, 9:].tolist()
    assert ended == expected[: last + 1]
    eos: dict[str, Any] = {"eos_id": expected[last], "device": torch.device("cpu")}
    assert generate_ids(model, prompt[0].tolist(), tokens=90, **eos, **common) == expected[:last]


@torch.no_grad()
def test_a_full_cache_begins_again_with_the_newer_half():
    config = replace(SMALL, **WIDE)
    model = decoder(config, torch.float32).eval()
    ids = tokens_of(config, 1, 6)[0].tolist()
    common: dict[str, Any] = {"context": 8, "vocab_size": 300, "temperature": 0.0, "top_k": 0, "seed": 0}
    ours = generate_ids(model, ids, tokens=9, eos_id=None, device=torch.device("cpu"), **common)
    # 6 read, 2 more; then the newest 4 begin again and 4 more follow; then the newest 4 once more.
    expected, begin = list(ids), 0
    for _ in range(9):
        if len(expected) - begin > 8:
            begin = len(expected) - 4
        window = torch.tensor([expected[begin:]])
        expected.append(int(model(window, positions_of(window))[0, -1].argmax()))
    assert ours == expected[6:]
