"""A plan applied: how parameters are held, and that every layout computes what the unsplit model does, in FP64."""

from dataclasses import dataclass, replace

import pytest
import rank_tasks
import torch
from tiny_models import SMALL, decoder, labels_of, positions_of, tokens_of

from octofold.parallel.local_ranks import LocalRanks
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.models.config import ModelConfig

# Dimensions that no number of ranks divides, so that shards are uneven and some are empty.
UNEVEN = replace(SMALL, vocab_size=51, hidden_size=25, num_hidden_layers=3, n_shared_experts=1, q_lora_rank=7)
EIGHT = replace(UNEVEN, n_routed_experts=8, num_experts_per_tok=3)
TIED = replace(SMALL, tie_word_embeddings=True)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@pytest.mark.parametrize(("n", "expert"), LAYOUTS)
@pytest.mark.parametrize(
    ("precision", "compute", "master"),
    [("bf16", torch.bfloat16, torch.float32), ("fp64", torch.float64, torch.float64)],
)
def test_master_and_compute_dtypes(ranks, n, expert, precision, compute, master):
    for found in ranks(n).run(rank_tasks.dtypes, SMALL, expert, precision):
        assert found["logits"] == compute
        assert found["biases"] == {master}
        assert set(found["held"].values()) == set(found["gradients"].values()) == {master}
        assert found["computed"].keys() == found["held"].keys() == found["gradients"].keys()
        assert set(found["computed"].values()) == {compute}
        assert found["axes"].keys() == found["held"].keys(), "every parameter is a DTensor"
        for name, axes in found["axes"].items():
            if ".mlp.experts." not in name:
                assert axes == ("shard",), name
            else:
                assert "expert_data" in axes, name
                assert ("expert" in axes) == (expert > 1), name


@pytest.mark.parametrize("model", [UNEVEN, EIGHT, TIED], ids=["uneven", "eight", "tied"])
def test_initial_weights_are_equal_bit_for_bit_on_every_layout(ranks, model):
    expected = decoder(model, torch.float32).state_dict()
    assert len(expected) > 20
    for n, expert in LAYOUTS:
        for found in ranks(n).run(rank_tasks.initial_weights, model, expert, "bf16"):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), (n, expert)


@dataclass(frozen=True)
class Unsplit:
    """One forward and backward pass of a plain module over a whole global batch."""

    loss: float
    gradients: dict[str, torch.Tensor]
    loads_GE: torch.Tensor


def unsplit(model: ModelConfig, tokens_BS: torch.Tensor) -> Unsplit:
    plain = decoder(model)
    labels_BS = labels_of(tokens_BS)
    loss = summed_cross_entropy(plain(tokens_BS, positions_of(tokens_BS)), labels_BS) / valid_tokens(labels_BS)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    return Unsplit(loss.item(), gradients, torch.stack([gate.load_E for gate in plain.gates().values()]).double())


def assert_same_gradients(started: LocalRanks, model: ModelConfig, expert: int, micro: int) -> None:
    tokens_BS = tokens_of(model, 8, 11)
    expected = unsplit(model, tokens_BS)
    norm = torch.stack([gradient.square().sum() for gradient in expected.gradients.values()]).sum().sqrt().item()
    for found in started.run(rank_tasks.gradients, model, expert, tokens_BS, micro):
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-12)
        assert found["norm"] == pytest.approx(norm, rel=1e-9)
        assert torch.equal(found["loads"], expected.loads_GE)
        assert found["gradients"].keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert gradient.any(), name
            difference = (found["gradients"][name] - gradient).abs().max()
            assert difference < 1e-9 * max(1.0, float(gradient.abs().max())), f"{name}: {difference:.1e}"


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(("n", "expert"), LAYOUTS)
def test_every_gradient_equals_the_unsplit_models(ranks, n, expert, micro):
    """Ranks count different numbers of valid tokens, and each accumulates over several micro-batches."""
    assert_same_gradients(ranks(n), EIGHT, expert, micro)


@pytest.mark.parametrize(("n", "expert"), [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("model", [UNEVEN, TIED], ids=["uneven", "tied"])
def test_every_gradient_equals_the_unsplit_models_in_other_models(ranks, model, n, expert):
    assert_same_gradients(ranks(n), model, expert, 1)
