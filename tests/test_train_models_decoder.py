"""What the decoder promises beside parity: documents apart, no look ahead, expert biases, counters, tied weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALL, decoder, kernels_for, labels_of, positions_of, tokens_of

from octofold.train.loss import summed_cross_entropy
from octofold.train.models.gate import TopKGate

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
"""FP64; products over other groupings of rows may differ in the last bits."""


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), restart=st.booleans())
def test_masked_documents_are_as_if_alone(lengths, restart):
    """Rotary positions are relative, so that it does not matter whether they restart with each document."""
    model = decoder(SMALL)
    documents = [tokens_of(SMALL, 1, length, seed) for seed, length in enumerate(lengths)]
    tokens_BS = torch.cat(documents, dim=1)
    doc_ids_BS = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
    positions_BS = positions_of(tokens_BS)
    if restart:
        positions_BS = torch.cat([positions_of(document) for document in documents], dim=1)
    together = model(tokens_BS, positions_BS, doc_ids_BS).split(lengths, dim=1)
    for document, logits in zip(documents, together, strict=True):
        torch.testing.assert_close(logits, model(document, positions_of(document)), **EXACT)


@settings(max_examples=15)
@given(length=st.integers(2, 140), data=st.data())
def test_a_later_token_changes_no_earlier_logit(length, data):
    model = decoder(SMALL)
    changed = data.draw(st.integers(0, length - 1))
    tokens_BS = tokens_of(SMALL, 1, length)
    other_BS = tokens_BS.clone()
    other_BS[0, changed] = (other_BS[0, changed] + 1) % SMALL.vocab_size
    before, after = (model(tokens, positions_of(tokens)) for tokens in (tokens_BS, other_BS))
    torch.testing.assert_close(after[:, :changed], before[:, :changed], **EXACT)
    assert not torch.allclose(after[:, changed], before[:, changed])


@pytest.mark.parametrize("normalised", [True, False])
def test_the_bias_chooses_and_does_not_weigh(normalised):
    config = replace(SMALL, norm_topk_prob=normalised, routed_scaling_factor=1.5)
    gate = TopKGate(config, kernels_for(config, torch.float64)).double()
    x_TD = torch.randn(60, config.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(1))
    scores_TE = torch.sigmoid(x_TD @ gate.weight.t())
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 2.0, 0.0, -2.0]))
    experts_TK, weights_TK = gate(x_TD[None])
    assert (experts_TK == 1).any(1).all(), "scores lie between 0 and 1: a bias of 2 wins everywhere"
    assert not (experts_TK == 3).any()
    expected_TK = scores_TE.gather(1, experts_TK)
    if normalised:
        expected_TK = expected_TK / expected_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weights_TK, 1.5 * expected_TK)
    weights_TK.square().sum().backward()
    assert not gate.e_score_correction_bias.requires_grad


def test_loads_count_in_training_only():
    model = decoder(SMALL)
    tokens_BS = tokens_of(SMALL, 2, 9)
    (gate,) = model.gates().values()
    model.eval()(tokens_BS, positions_of(tokens_BS))
    assert not gate.load_E.any()
    for passes in (1, 2):
        model.train()(tokens_BS, positions_of(tokens_BS))
        assert gate.load_E.sum() == passes * tokens_BS.numel() * SMALL.num_experts_per_tok
    gate.reset_balance()
    assert not gate.load_E.any()
    assert "layers.1.mlp.gate.load_E" not in model.state_dict()
    assert "layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_tied_embeddings_are_one_parameter():
    model = decoder(replace(SMALL, tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    names = dict(model.named_parameters()).keys()
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    tokens_BS = tokens_of(SMALL, 2, 5)
    summed_cross_entropy(model(tokens_BS, positions_of(tokens_BS)), labels_of(tokens_BS)).backward()
    absent = sorted(set(range(SMALL.vocab_size)) - set(tokens_BS.flatten().tolist()))
    assert model.embed_tokens.weight.grad is not None
    assert model.embed_tokens.weight.grad[absent].any(1).all(), "the head alone reaches tokens that do not occur"


def test_plan_and_gates_name_the_moe_layers():
    model = decoder(replace(SMALL, num_hidden_layers=3))
    assert model.plan().blocks == ("layers.0", "layers.1", "layers.2")
    assert model.plan().experts == ("layers.1.mlp.experts", "layers.2.mlp.experts")
    assert list(model.gates()) == [1, 2]


def test_without_shared_experts():
    model = decoder(replace(SMALL, n_shared_experts=0))
    assert not any("shared_experts" in name for name, _ in model.named_parameters())
    tokens_BS = tokens_of(SMALL, 1, 4)
    assert model(tokens_BS, positions_of(tokens_BS)).isfinite().all()
