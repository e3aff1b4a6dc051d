"""Every schedule of a pipeline adds up the gradients that the unsplit model has."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pipeline_tasks import batch_of, deep, loss_of, unsharded
from tiny_models import decoder, positions_of

from octofold.parallel.local_ranks import LocalRanks
from octofold.parallel.pipeline_split import SCHEDULES


@cache
def alone(layers: int, depths: int, micro_batches: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = deep(layers, depths)
    whole, (tokens, labels, ahead) = decoder(model), batch_of(model, micro_batches)
    loss_of(whole(tokens, positions_of(tokens), ahead=ahead), labels).backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return gradients, whole(tokens[:1, :5], positions_of(tokens[:1, :5]))


def check(ranks: Callable[[int], LocalRanks], n: int, schedule: str, layers: int, depths: int, steps: int) -> None:
    micro_batches = 2 * n
    found = ranks(n).run(unsharded, schedule, deep(layers, depths), micro_batches, steps)
    expected, logits = alone(layers, depths, micro_batches)
    summed: dict[str, torch.Tensor] = {}
    for rank in found:
        for name, gradient in rank["gradients"]:
            summed[name] = summed.get(name, torch.zeros(())) + gradient
    assert summed.keys() == expected.keys()
    for name, gradient in summed.items():
        torch.testing.assert_close(gradient, steps * expected[name], rtol=1e-9, atol=1e-12, msg=name)
    (last,) = [rank["logits"] for rank in found if rank["logits"] is not None]
    torch.testing.assert_close(last, logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks(schedule, ranks):
    """With multi-token prediction; two steps, so that what a step leaves behind would show."""
    check(ranks, 2, schedule, layers=5, depths=1, steps=2)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_four_ranks(schedule, ranks):
    check(ranks, 4, schedule, layers=8, depths=0, steps=1)
