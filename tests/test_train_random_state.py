"""What a step draws follows from seed, step and sample: a run with dropout resumes as itself."""

import pytest
import run_tasks
import torch
from run_configs import tiny_run, write_corpus

from octofold.train.random_state import seed_step

STEPS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def undisturbed(root, ranks):
    return ranks(1).run(run_tasks.run_with_dropout, tiny_run(root, train={"steps": STEPS}), root / "undisturbed")[0]


def test_draws_differ_by_every_coordinate_and_by_nothing_else():
    drawn = {}
    for told in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 8), (0, 1, 0, 1), (0, 1, 0, 0, 1)]:
        seed_step(*told)
        drawn[told] = torch.rand(4)
        torch.rand(3)
        seed_step(*told)
        assert torch.equal(torch.rand(4), drawn[told])
    assert len({tuple(x.tolist()) for x in drawn.values()}) == len(drawn)


def test_a_resumed_run_draws_as_the_undisturbed_one_did(root, ranks, undisturbed, tmp_path):
    config = tiny_run(root, train={"steps": STEPS})
    ranks(1).run(run_tasks.run_with_dropout, config, tmp_path / "run", 2)
    resumed = tiny_run(root, train={"steps": STEPS}, resume=str(tmp_path / "run"))
    found = ranks(1).run(run_tasks.run_with_dropout, resumed, tmp_path / "run")[0]
    assert [r["loss"] for r in found["records"]] == [r["loss"] for r in undisturbed["records"]]
    for name, tensor in undisturbed["tensors"].items():
        assert tensor.tobytes() == found["tensors"][name].tobytes(), name


def test_a_step_that_is_computed_again_draws_the_same(root, ranks, undisturbed, tmp_path):
    config = tiny_run(root, train={"steps": STEPS, "recheck_every": 1})
    found = ranks(1).run(run_tasks.run_with_dropout, config, tmp_path / "run")[0]
    assert [r["loss"] for r in found["records"]] == [r["loss"] for r in undisturbed["records"]]
