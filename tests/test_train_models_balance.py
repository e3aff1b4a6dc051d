"""Balance losses against the papers' sums written out as loops over tokens and experts, and how they are injected.

B sequences, S positions, E experts, K experts a token, G groups of experts, D hidden width. Everything is FP64.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SMALL, kernels_for

from octofold.parallel.sequence import WholeSequence
from octofold.train.models.balance import LOSSES, balance_losses, inject
from octofold.train.models.config import BalanceConfig, ModelConfig, check
from octofold.train.models.gate import TopKGate, take_loss_sums

WEIGHTS = {"sequence": 0.7, "expert": 0.9, "device": 1.1, "communication": 1.3, "z": 0.4}
WIDTH = 6


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    sequences: int
    positions: int
    seed: int

    def gate(self) -> TopKGate:
        """In training mode, with a bias that changes the choice where the gate has one."""
        torch.manual_seed(self.seed)
        gate = TopKGate(self.config, kernels_for(self.config, torch.float64)).double()
        torch.nn.init.normal_(gate.weight)
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.normal_(std=0.3)
        return gate

    def hidden(self) -> torch.Tensor:
        """[B, S, D], the same on every call."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.sequences, self.positions, WIDTH)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def config_of(experts: int = 8, groups: int = 4, reach: int = 2, chosen: int = 3, method: str = "", **losses: float):
    """A gate of V3's kind, or of V2's by its `method`, with balance losses."""
    v2 = {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False} if method else {}
    config = replace(
        SMALL,
        hidden_size=WIDTH,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=reach,
        num_experts_per_tok=chosen,
        balance=BalanceConfig(bias_update_rate=0.0, **{f"{name}_loss": weight for name, weight in losses.items()}),
        **v2,
    )
    check(config)
    return config


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Gates of every kind; one position, one sequence, one expert a token and all experts a token among them."""
    method = draw(st.sampled_from(["", "greedy", "group_limited_greedy"]))
    groups = draw(st.sampled_from([1, 2, 3]))
    in_group = draw(st.integers(1 if method or groups == 1 else 2, 4))
    reach = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, reach * in_group))
    legal = [name for name in LOSSES if groups > 1 or name not in ("device", "communication")]
    losses = {name: WEIGHTS[name] for name in draw(st.sets(st.sampled_from(legal), min_size=1))}
    config = config_of(groups * in_group, groups, reach, chosen, method, **losses)
    return Case(config, draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 1000)))


def paper_losses(
    config: ModelConfig, x_SD: torch.Tensor, weight_ED: torch.Tensor, chosen: list[set[int]]
) -> dict[str, torch.Tensor]:
    """Every loss of one sequence, from the papers' formulas; `chosen` are the experts of each token."""
    S, E, K, G, M = (
        len(x_SD),
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
    )
    logits = [[(x * w).sum() for w in weight_ED] for x in x_SD]
    if config.scoring_func == "softmax":
        s = [[u.exp() / sum(v.exp() for v in row) for u in row] for row in logits]
    else:
        s = [[1 / (1 + (-u).exp()) for u in row] for row in logits]
    P = [sum(s[t][i] / sum(s[t]) for t in range(S)) / S for i in range(E)]
    values = [[float(u.detach()) for u in row] for row in s]
    best = [set(sorted(range(E), key=row.__getitem__)[E - K :]) for row in values]
    alone = [E / (K * S) * sum(i in best[t] for t in range(S)) for i in range(E)]
    f = [E / (K * S) * sum(i in chosen[t] for t in range(S)) for i in range(E)]
    devices = [range(g * E // G, (g + 1) * E // G) for g in range(G)]
    P_device = [sum(P[i] for i in device) for device in devices]
    f_device = [sum(f[i] for i in device) / len(device) for device in devices]
    f_sent = [G / (M * S) * sum(any(i in device for i in chosen[t]) for t in range(S)) for device in devices]
    terms = {
        "sequence": [alone[i] * P[i] for i in range(E)],
        "expert": [f[i] * P[i] for i in range(E)],
        "device": [f_device[g] * P_device[g] for g in range(G)],
        "communication": [f_sent[g] * P_device[g] for g in range(G)],
        "z": [sum(u.exp() for u in row).log() ** 2 / S for row in logits],
    }
    return {name: torch.stack(values).sum() for name, values in terms.items()}


def paper_sums(case: Case, x_BSD: torch.Tensor, gate: TopKGate) -> dict[str, torch.Tensor]:
    """The papers' losses that have a weight, summed over sequences, as functions of `gate.weight` and `x_BSD`."""
    # A gate of its own makes the choice, so that the other's sums stay as they are.
    experts_BSK = case.gate()(x_BSD)[0].view(case.sequences, case.positions, -1)
    each = [
        paper_losses(case.config, x_SD, gate.weight, [set(chosen) for chosen in experts_SK.tolist()])
        for x_SD, experts_SK in zip(x_BSD, experts_BSK, strict=True)
    ]
    wanted = [name for name in LOSSES if getattr(case.config.balance, f"{name}_loss")]
    return {name: torch.stack([losses[name] for losses in each]).sum() for name in wanted}


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def through_gate(gate: TopKGate, x_BSD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A main loss that depends on the gate's weights, and its gradients with respect to gate and hidden states."""
    _, weights_TK = gate(x_BSD)
    main = (weights_TK * torch.arange(1.0, weights_TK.numel() + 1, dtype=torch.float64).view_as(weights_TK)).sum()
    return main, gradients(main, gate.weight, x_BSD)


@given(case=cases())
def test_losses_and_their_gradients_are_the_papers(case):
    gate, x_BSD = case.gate(), case.hidden()
    experts_TK, _ = gate(x_BSD)
    logits_BSE = x_BSD @ gate.weight.t()
    scores_BSE = logits_BSE.softmax(-1) if case.config.scoring_func == "softmax" else logits_BSE.sigmoid()
    experts_BSK = experts_TK.view(case.sequences, case.positions, -1)
    found = balance_losses(case.config, logits_BSE, scores_BSE, experts_BSK, WholeSequence())
    expected = paper_sums(case, x_BSD, gate)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-12, atol=1e-12, msg=name)
        pairs = zip(gradients(found[name], gate.weight, x_BSD), gradients(loss, gate.weight, x_BSD), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@given(case=cases(), scale=st.sampled_from([1.0, 0.125, 3.0]))
def test_injection_adds_the_scaled_losses_to_the_main_loss(case, scale):
    gate, x_BSD = case.gate(), case.hidden()
    gate.loss_scale.fill_(scale)
    main, found = through_gate(gate, x_BSD)
    unbalanced = replace(case, config=replace(case.config, balance=BalanceConfig())).gate()
    plain, without = through_gate(unbalanced, x_BSD)
    assert torch.equal(main, plain), "the main loss keeps its value"
    sums = paper_sums(case, x_BSD, gate)
    weighted = torch.stack([WEIGHTS[name] * loss for name, loss in sums.items()]).sum()
    added = gradients(scale * weighted, gate.weight, x_BSD)
    for a, b, c in zip(found, without, added, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-11, atol=1e-11)


ALL_LOSSES = [
    pytest.param(config_of(**WEIGHTS), id="v3"),
    pytest.param(config_of(method="group_limited_greedy", **WEIGHTS), id="v2"),
]


@pytest.mark.parametrize("config", ALL_LOSSES)
def test_nothing_is_injected_without_a_scale_or_in_evaluation(config):
    case = Case(config, 2, 5, 0)
    x_BSD = case.hidden()
    _, without = through_gate(replace(case, config=replace(config, balance=BalanceConfig())).gate(), x_BSD)
    fresh, evaluated = case.gate(), case.gate().eval()
    evaluated.loss_scale.fill_(1.0)
    for gate in (fresh, evaluated):
        _, found = through_gate(gate, x_BSD)
        assert all(torch.equal(a, b) for a, b in zip(found, without, strict=True))
    assert fresh.loss_sums_J.all(), "they are still reported"
    assert not evaluated.loss_sums_J.any()


@pytest.mark.parametrize("config", ALL_LOSSES)
def test_sums_are_over_passes_and_layers_until_they_are_taken(config):
    both = [Case(config, 2, 5, 0), Case(config, 1, 3, 7)]
    gates = [case.gate() for case in both]
    for case, gate in zip(both, gates, strict=True):
        gate(case.hidden())
        gate(case.hidden())
    expected = [paper_sums(case, case.hidden(), gate) for case, gate in zip(both, gates, strict=True)]
    total_J = torch.stack([2 * (expected[0][name] + expected[1][name]) for name in LOSSES])
    torch.testing.assert_close(take_loss_sums(gates), total_J)
    assert not take_loss_sums(gates).any()


def test_an_even_gate_loses_one_of_each():
    """Equal scores: every loss of loads is 1 whatever is chosen, as long as each token reaches all its groups."""
    config = config_of(experts=8, groups=4, reach=2, chosen=4, **WEIGHTS)
    gate = Case(config, 1, 7, 0).gate()
    torch.nn.init.zeros_(gate.weight)
    # By bias two groups win, each with both its experts.
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.3, 0.3, 0.0, 0.0, 0.2, 0.2]))
    gate(torch.zeros(1, 7, WIDTH, dtype=torch.float64))
    even = dict.fromkeys(LOSSES, 1.0) | {"z": float(torch.tensor(8.0).log() ** 2)}
    assert gate.loss_sums_J.tolist() == pytest.approx([even[name] for name in LOSSES])


def test_all_tokens_on_one_expert_is_the_worst_that_can_be():
    """Where one expert gets all tokens and all affinity, the expert loss is E, and that of devices G."""
    config = config_of(experts=8, groups=4, reach=1, chosen=1, method="greedy", **WEIGHTS)
    gate = Case(config, 2, 5, 0).gate()
    torch.nn.init.zeros_(gate.weight)
    with torch.no_grad():
        gate.weight[5] = 50.0
    gate(torch.ones(2, 5, WIDTH, dtype=torch.float64))
    worst = dict(zip(LOSSES, (gate.loss_sums_J / 2).tolist(), strict=True))
    expected = {"sequence": 8.0, "expert": 8.0, "device": 4.0, "communication": 4.0, "z": (50.0 * WIDTH) ** 2}
    assert worst == pytest.approx(expected)


def test_inject_leaves_its_carrier_as_it_is():
    carrier = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = torch.tensor(2.0, requires_grad=True)
    carried = inject(carrier, loss, torch.tensor(0.25))
    assert torch.equal(carried, carrier)
    carried.sum().backward()
    assert torch.equal(carrier.grad, torch.ones(4, 3))
    assert loss.grad == 0.25, "whatever the carrier's own gradient is"
