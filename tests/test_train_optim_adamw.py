"""Parameter groups of AdamW: every parameter once, decay for matrices, one mesh a group."""

from dataclasses import replace

import pytest
import rank_tasks
import torch
from tiny_models import SMALL, decoder

from octofold.backends.errors import ConfigError
from octofold.train.config import OptimConfig
from octofold.train.optim.adamw import build_adamw

OPTIM = OptimConfig(lr=0.25, beta1=0.7, beta2=0.8, eps=1e-5, weight_decay=0.3)


@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_the_embedding_do_not_decay(tied):
    model = decoder(replace(SMALL, q_lora_rank=6, tie_word_embeddings=tied))
    optimizer = build_adamw(model, OPTIM)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        spared = "norm" in name or name == "embed_tokens.weight"
        assert decay.pop(id(parameter)) == (0.0 if spared else 0.3), name
    assert not decay
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.7, 0.8), 1e-5)


def test_other_patterns():
    model = decoder(SMALL)
    optimizer = build_adamw(model, replace(OPTIM, no_decay=["layers.1.*", "lm_head.weight"]))
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
    assert names == {n for n, _ in model.named_parameters() if n.startswith("layers.1.")} | {"lm_head.weight"}
    with pytest.raises(ConfigError, match=r"optim\.no_decay=layer\.1\.\*\n"):
        build_adamw(model, replace(OPTIM, no_decay=["*norm*", "layer.1.*"]))


@pytest.mark.usefixtures("world_of_one")
def test_a_group_has_one_mesh():
    model = rank_tasks.build(SMALL).model
    optimizer = build_adamw(model, OPTIM)
    meshes = [{p.device_mesh for p in group["params"]} for group in optimizer.param_groups]
    assert all(len(found) == 1 for found in meshes)
    # Dense with and without decay, experts with decay.
    assert len(meshes) == 3


def test_an_update_is_adamws():
    """Against the formula (Loshchilov and Hutter 2019, algorithm 2), after one step from zero moments."""
    model = decoder(SMALL)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, OPTIM)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if "norm" in name or "embed" in name else 0.3
        expected = before[name] * (1 - 0.25 * decay) - 0.25 * 0.01 / (0.01 + 1e-5)
        torch.testing.assert_close(parameter.detach(), expected)
