"""Expert biases move against the sign of the load error of the whole global batch."""

import rank_tasks
import torch

# One layer with loads whose error has another sign on each rank than over both; one with every expert at the mean.
LOADS_RGE = torch.tensor([[[6, 2, 4, 0], [5, 5, 0, 10]], [[0, 4, 0, 20], [5, 5, 10, 0]]])


def test_the_sign_is_that_of_the_global_load(ranks):
    for loads_GE, biases, counters in ranks(2).run(rank_tasks.balance, LOADS_RGE, 0.25):
        assert loads_GE.tolist() == [[6, 6, 4, 20], [10, 10, 10, 10]]
        # The mean of the first layer is 9. Rank 0 alone (mean 3) would have lowered experts 0 and 2, and raised 3.
        assert biases[0].tolist() == [0.75, 0.75, 0.75, 0.25]
        assert biases[1].tolist() == [0.5, 0.5, 0.5, 0.5], "at the mean nothing moves"
        assert not any(counter.any() for counter in counters), "counters begin again"


def test_a_rate_of_zero_moves_nothing(ranks):
    for _, biases, _ in ranks(2).run(rank_tasks.balance, LOADS_RGE, 0.0):
        assert all(bias.tolist() == [0.5] * 4 for bias in biases)
