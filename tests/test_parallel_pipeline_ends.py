"""Both ends of a pipeline get the sum of their gradients of a parameter, whoever of them has one."""

import pytest
import rank_tasks
import torch

from octofold.parallel.pipeline_ends import SharedEnds


@pytest.mark.parametrize(
    ("held", "total"), [((True, True), 3.0), ((True, False), 1.0), ((False, True), 2.0), ((False, False), 0.0)]
)
def test_ends_on_two_ranks(held, total, ranks):
    assert ranks(2).run(rank_tasks.sum_shared_gradients, held, timeout_s=30) == [total, total]


def test_ends_on_one_rank():
    class Alone:
        def rank(self) -> int:
            return 0

    original, copied = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    copied.grad = torch.ones(3)
    SharedEnds(original, copied, Alone(), last=0).sum_gradients()
    assert original.grad.tolist() == copied.grad.tolist() == [1.0, 1.0, 1.0]
