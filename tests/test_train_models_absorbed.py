"""Generation: absorbed attention over cached latents equals the full forward pass, and greedy text is transformers'."""

from dataclasses import replace
from typing import Any

import pytest
import rank_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import ours_from, peer_of
from test_train_models_parity import V2, YARN, configurations
from tiny_models import SMALL, decoder, positions_of, tokens_of

from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.process_group import RankInfo, joined
from octofold.train.models.attention import LatentAttention, LatentCache
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
        torch.testing.assert_close(in_pieces(model, tokens_BS, split), expected, rtol=0, atol=1e-10)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_cache_holds_latents_only(dtype):
    config = replace(SMALL, num_hidden_layers=3, num_nextn_predict_layers=1)
    model, cache = decoder(config, dtype).eval(), LatentCache(3, capacity=40)
    tokens_BS = tokens_of(config, 2, 10)
    model(tokens_BS, positions_of(tokens_BS), cache=cache)
    assert cache.size_bytes == 3 * 2 * 40 * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    with pytest.raises(AssertionError, match="full"):
        model(tokens_of(config, 2, 31), positions_of(tokens_of(config, 2, 31)), cache=cache)


@torch.no_grad()
def logits_when_split(config: ModelConfig, expert: int, tokens_BS: torch.Tensor) -> dict[str, Any]:
    """On every rank: logits over the cache and without it, and the kinds of weights and cached numbers meanwhile."""
    model = rank_tasks.build(config, expert).model.eval()
    attention = model.get_submodule("layers.1.self_attn")
    seen: dict[str, Any] = {"held": type(attention.kv_b_proj.weight).__name__}

    def note(module: LatentAttention, *_: Any) -> None:
        # Read inside the block, not by calling kv_b_proj, whose own hooks therefore do not run.
        seen["computed"] = type(module.kv_b_proj.weight).__name__, tuple(module.kv_b_proj.weight.shape)

    attention.register_forward_pre_hook(note)
    seen["cached"] = in_pieces(model, tokens_BS, [tokens_BS.shape[1] - 2, 1, 1])
    return {**seen, "at once": model(tokens_BS, positions_of(tokens_BS))}


@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 1), (2, 2)])
def test_weights_are_gathered_when_the_layer_reads_them(ranks, size, expert):
    config = replace(SMALL, q_lora_rank=6, rope_scaling=YARN)
    tokens_BS = tokens_of(config, 2, 9)
    model = decoder(config).eval()
    expected = model(tokens_BS, positions_of(tokens_BS))
    whole = ("Parameter", tuple(model.get_submodule("layers.1.self_attn").kv_b_proj.weight.shape))
    for seen in ranks(size).run(logits_when_split, config, expert, tokens_BS):
        assert seen["held"] == "DTensor"
        assert seen["computed"] == whole
        for logits in (seen["cached"], seen["at once"]):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def world() -> Any:
    """Ranks agree on each token, so there is a world, of one."""
    with joined(CpuBackend(), BackendConfig(threads=1), RankInfo()):
        yield


WIDE: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.5}
"""Wide enough that no two logits tie."""
GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}


GREEDY: dict[str, Any] = {"vocab_size": 300, "temperature": 0.0, "top_k": 0, "seed": 0, "device": torch.device("cpu")}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, **WIDE),
        replace(SMALL, **WIDE, q_lora_rank=7, rope_scaling=YARN, **GROUPS),
        replace(V2, **WIDE, rope_scaling=YARN),
        replace(V2, **WIDE, **GROUPS, q_lora_rank=7, topk_method="group_limited_greedy"),
    ],
    ids=["V3", "V3 groups query-rank YaRN", "V2 YaRN", "V2 groups query-rank"],
)
def test_greedy_text_is_transformers(config: ModelConfig, seed: int) -> None:
    peer = peer_of(config, seed).eval()
    prompt_1S = tokens_of(config, 1, 9, seed)
    prompt = prompt_1S[0].tolist()

    def theirs(eos_id: int | None) -> list[int]:
        # With the mask, since the library would take some token of the prompt for padding.
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt_1S), "pad_token_id": 0}
        text = peer.generate(prompt_1S, max_new_tokens=90, do_sample=False, eos_token_id=eos_id, **settings)
        return text[0, 9:].tolist()

    model, expected = ours_from(peer, config), theirs(None)
    assert len(set(expected)) > 5
    assert generate_ids(model, prompt, tokens=90, context=200, eos_id=None, **GREEDY) == expected
    # The first token that has not occurred before becomes the end of text.
    last = next(i for i in range(5, 90) if expected[i] not in expected[:i])
    assert theirs(expected[last]) == expected[: last + 1]
    assert generate_ids(model, prompt, tokens=90, context=200, eos_id=expected[last], **GREEDY) == expected[:last]


@pytest.mark.usefixtures("world")
@given(length=st.integers(1, 20), tokens=st.integers(0, 30), context=st.integers(1, 12))
@torch.no_grad()
def test_a_full_cache_begins_again_with_the_newer_half(length, tokens, context):
    config = replace(SMALL, **WIDE)
    model = decoder(config, torch.float32).eval()
    ids = tokens_of(config, 1, length)[0].tolist()
    ours = generate_ids(model, ids, tokens=tokens, context=context, eos_id=None, **GREEDY)
    # Without a cache: what is seen begins `context` back, and half of that back whenever it would come to more.
    expected, begin = list(ids), max(length - context, 0)
    for _ in range(tokens):
        if len(expected) - begin > context:
            begin = len(expected) - max(context // 2, 1)
        window = torch.tensor([expected[begin:]])
        expected.append(int(model(window, positions_of(window))[0, -1, :300].argmax()))
    assert ours == expected[length:]
