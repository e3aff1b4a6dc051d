"""Initial weights: their distribution, and that each depends on the seed, its name and its expert alone."""

from dataclasses import replace

import torch
from tiny_models import SMALL, decoder

WIDE = replace(SMALL, hidden_size=64, moe_intermediate_size=48, vocab_size=300, initializer_range=0.02)


def test_statistics():
    for name, parameter in decoder(WIDE, torch.float32).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        # Five standard errors of the mean and of the deviation of a normal sample.
        count = parameter.numel()
        assert abs(parameter.mean()) < 5 * 0.02 / count**0.5, name
        assert abs(parameter.std() - 0.02) < 5 * 0.02 / (2 * count) ** 0.5, name


def test_no_two_matrices_are_alike():
    rows: list[torch.Tensor] = []
    for parameter in decoder(WIDE, torch.float32).parameters():
        if parameter.ndim > 1:
            rows += [matrix.flatten()[:8] for matrix in (parameter if parameter.ndim == 3 else [parameter])]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_an_experts_matrix_does_not_depend_on_how_many_there_are():
    few, many = (decoder(replace(SMALL, n_routed_experts=n), torch.float32).state_dict() for n in (4, 7))
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"):
        assert torch.equal(few[name], many[name][:4])


def test_the_seed_decides():
    first, again, other = (decoder(SMALL, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


def test_fp64_starts_where_fp32_does():
    exact, single = decoder(SMALL).state_dict(), decoder(SMALL, torch.float32).state_dict()
    assert all(torch.equal(exact[name], single[name].to(exact[name].dtype)) for name in exact)
