"""The choice of experts stays inside a token's groups, so that the groups' places bound where the token travels."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SMALL, kernels_for

from octofold.train.models.config import BalanceConfig, ModelConfig, check
from octofold.train.models.gate import TopKGate

TOKENS, WIDTH = 40, 6


@st.composite
def grouped(draw: st.DrawFn) -> ModelConfig:
    """V2's and V3's kinds with 1 to 6 groups."""
    is_v2 = draw(st.booleans())
    groups = draw(st.integers(1, 6))
    in_group = draw(st.integers(1 if is_v2 or groups == 1 else 2, 5))
    reach = draw(st.integers(1, groups))
    kind = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"} if is_v2 else {}
    config = replace(
        SMALL,
        hidden_size=WIDTH,
        n_routed_experts=groups * in_group,
        n_group=groups,
        topk_group=reach,
        num_experts_per_tok=draw(st.integers(1, reach * in_group)),
        balance=BalanceConfig(bias_update_rate=0.0),
        **kind,
    )
    check(config)
    return config


def gate_and_hidden(config: ModelConfig, seed: int, bias: float) -> tuple[TopKGate, torch.Tensor]:
    """A random gate whose biases have the standard deviation `bias`, and hidden states [1, T, D]."""
    torch.manual_seed(seed)
    gate = TopKGate(config, kernels_for(config, torch.float64)).double()
    torch.nn.init.normal_(gate.weight)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.normal_(std=bias)
    return gate, torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)


def values_chosen_by(gate: TopKGate, x_TD: torch.Tensor) -> torch.Tensor:
    """[T, E]: score, plus bias where there is one."""
    logits_TE = x_TD @ gate.weight.t()
    if gate.e_score_correction_bias is None:
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() + gate.e_score_correction_bias


@given(config=grouped(), seed=st.integers(0, 1000), bias=st.sampled_from([0.0, 0.3, 5.0]))
def test_a_token_reaches_no_more_nodes_than_groups(config, seed, bias):
    """Experts lie over nodes in their order; a node holds whole groups. Biases may push all values below 0."""
    gate, x_BSD = gate_and_hidden(config, seed, bias)
    chosen = gate(x_BSD)[0].tolist()
    experts, groups = config.n_routed_experts, config.n_group
    for nodes in (n for n in range(1, groups + 1) if groups % n == 0):
        for token in chosen:
            assert len(set(token)) == config.num_experts_per_tok
            assert len({expert // (experts // nodes) for expert in token}) <= config.topk_group


@given(config=grouped(), seed=st.integers(0, 1000), bias=st.sampled_from([0.0, 0.3, 5.0]))
def test_the_best_experts_of_the_best_groups_are_chosen(config, seed, bias):
    """Token by token: a group counts as its best expert (V2) or the sum of its two best (V3)."""
    gate, x_BSD = gate_and_hidden(config, seed, bias)
    in_group = config.n_routed_experts // config.n_group
    counted = 2 if config.topk_method == "noaux_tc" else 1
    for values, found in zip(values_chosen_by(gate, x_BSD[0]).tolist(), gate(x_BSD)[0].tolist(), strict=True):
        groups = [range(g * in_group, (g + 1) * in_group) for g in range(config.n_group)]
        groups.sort(key=lambda group: -sum(sorted((values[i] for i in group), reverse=True)[:counted]))
        open_to = [expert for group in groups[: config.topk_group] for expert in group]
        best = sorted(open_to, key=lambda i: -values[i])[: config.num_experts_per_tok]
        assert set(found) == set(best)


@given(config=grouped(), seed=st.integers(0, 1000))
def test_one_group_is_no_limit(config, seed):
    config = replace(config, n_group=1, topk_group=1)
    gate, x_BSD = gate_and_hidden(config, seed, 0.3)
    plain = values_chosen_by(gate, x_BSD[0]).topk(config.num_experts_per_tok).indices
    assert torch.equal(gate(x_BSD)[0].sort().values, plain.sort().values)
