"""Sums inside nodes, then between them, equal flat ones; groups whose nodes differ in size are refused."""

import collective_tasks
import pytest
import torch

from octofold.backends.topology import Topology


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Of four ranks."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("per_node", [1, 2, 4, 8])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 5), torch.float64), ((), torch.float64), ((7,), torch.int64)])
def test_steps_equal_one_sum(per_node, shape, dtype, ranks):
    x = values(shape, dtype)
    expected = torch.stack(x).sum(0)
    for summed in ranks(4).run(collective_tasks.hierarchical, x, Topology(per_node, per_node)):
        torch.testing.assert_close(summed, expected, rtol=1e-12, atol=0)


def test_ranks_may_belong_to_different_numbers_of_groups(ranks):
    ranks(4).run(collective_tasks.group_of, [0, 1, 2])
    x = values((4,))
    for summed in ranks(4).run(collective_tasks.hierarchical, x, Topology(2, 2)):
        torch.testing.assert_close(summed, torch.stack(x).sum(0), rtol=1e-12, atol=0)


def test_nodes_of_different_sizes_are_refused(ranks):
    for text in ranks(4).run(collective_tasks.hierarchical, values((4,)), Topology(3, 3)):
        assert text.startswith("backend.all_reduce=hierarchical\n  rule:   a hierarchical sum needs as many ranks")
        assert "3 rank(s) in node 0, 1 rank(s) in node 1" in text
        assert text.endswith("remedy: backend.all_reduce=flat")
