"""Stages cut from a decoder, one after the other in one process, compute what the whole computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import SMALL, decoder, positions_of, tokens_of

from octofold.parallel.plan import Part
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder

DEEP = replace(SMALL, num_hidden_layers=5)
MTP = replace(DEEP, num_nextn_predict_layers=2)
TIED = replace(MTP, tie_word_embeddings=True)


def cut(config: ModelConfig, *ends: int) -> list[Decoder]:
    whole, last = decoder(config), len(ends) - 1
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    parts = [Part(range(*layers), first=stage == 0, last=stage == last) for stage, layers in enumerate(bounds)]
    return [whole.stage(part) for part in parts]


def run(stages: list[Decoder], config: ModelConfig) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits, and gradients by name summed over the stages."""
    x = tokens_BS = tokens_of(config, 2, 9)
    ahead = [tokens_BS.roll(-depth - 1, 1) for depth in range(config.num_nextn_predict_layers)]
    for stage in stages:
        last: dict[str, Any] = {"ahead": ahead} if stage.part.last else {}
        x = stage(x, positions_of(tokens_BS), **last)
    torch.stack([logits.square().sum() for logits in x]).sum().backward()
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
    return list(x), gradients


@pytest.mark.parametrize("config", [DEEP, MTP, TIED], ids=["plain", "mtp", "tied"])
@pytest.mark.parametrize("ends", [(5,), (2, 5), (1, 2, 4, 5), (0, 5), (5, 5)])
def test_stages_compute_what_the_whole_does(config, ends):
    logits, gradients = run(cut(config, *ends), config)
    expected, expected_gradients = run([decoder(config)], config)
    assert len(logits) == 1 + config.num_nextn_predict_layers
    for found, whole in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=0.0, atol=0.0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-12, atol=1e-12)


def test_only_the_ends_hold_embedding_and_head():
    plain, mtp = cut(DEEP, 2, 4, 5), cut(MTP, 2, 4, 5)
    outside = [
        {name for name, _ in stage.named_parameters() if not name.startswith(("layers.", "mtp."))} for stage in plain
    ]
    assert outside == [{"embed_tokens.weight"}, set(), {"norm.weight", "lm_head.weight"}]
    assert [stage.copies_embedding for stage in mtp] == [False, False, True]
    assert [stage.copies_embedding for stage in plain] == [False, False, False]
    assert [len(stage.mtp) for stage in mtp] == [0, 0, 2]
    assert mtp[0].embed_tokens.weight is not mtp[2].embed_tokens.weight
    assert [sorted(stage.gates()) for stage in mtp] == [[1], [2, 3], [4, 5, 6]]
    assert mtp[2].plan().blocks == ("layers.4", "mtp.0", "mtp.1")
