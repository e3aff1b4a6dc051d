"""Planted faults: the proof of a layout says no and names what is wrong; without a fault it accuses nobody."""

import re
from pathlib import Path
from typing import Any

import pytest
from layout_cases import Case, run_of

from octofold.train.layout.prove import prove

LAYOUT = Case("data_shard=4 expert=2", micro=1)
MASKED = "data.mask_documents=true"  # so that ranks count different numbers of tokens
MOVED = r"expert bias of layers [\d, ]+ moved by local counts"
SPLIT = Case("data_shard=2 tensor=2", micro=1)
PIPELINE = Case("pipeline=2", micro=1)
OTHERS = {"norm_weights_not_summed_over_tensor": SPLIT, "embedding_not_summed_over_ends": PIPELINE}
"""Faults of other layouts."""
PLANTED = {
    "experts_not_summed": r"all expert weights, and of nothing else, .* contributions of some ranks are missing",
    "experts_summed_twice": r"gradients of all expert weights are 2x those of one rank: summed once too often",
    "bias_from_local_counts": MOVED,
    "divided_by_local_tokens": r"loss is off by the factor \d.*tokens_global/tokens_local is .* their own valid tokens",
    "mean_of_local_means": r"loss is off by the factor [01]\.\d+.* own valid tokens and took the mean",
    "mtp_gradient_dropped": r"mtp\.\* gradients are missing.*\n.*MTP losses are missing in the gradients of",
    "mtp_block_detached": r"mtp\.\* gradients are missing",
    "norm_counts_experts_twice": r"gradients are right, and the norm counts expert weights 2x",
    "balance_loss_lost_on_a_rank": r"balance losses are lost, or counted twice, on some ranks",
    "norm_weights_not_summed_over_tensor": r"copies of .* have different gradients: not summed over the ranks",
    "embedding_not_summed_over_ends": r"copies of embed_tokens.weight have different gradients",
}


QUICK = ["experts_not_summed", "experts_summed_twice", "bias_from_local_counts", "divided_by_local_tokens"]
QUICK += ["mtp_gradient_dropped"]
"""What the default suite plants; the rest is slow."""


@pytest.mark.parametrize(
    "fault", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in PLANTED if x not in QUICK)]
)
def test_a_planted_fault_is_named(fault, layout_root, alone, ranks, tmp_path):
    config, count = run_of("v3", OTHERS.get(fault, LAYOUT), layout_root, MASKED)
    proof = prove(config, count, tmp_path, ranks, expected=alone(config), task=f"layout_faults:{fault}")
    assert not proof.holds
    assert proof.differences[0].error > 1e-6
    assert re.search(PLANTED[fault], "\n".join(proof.diagnosis)), proof.diagnosis
    assert proof.apart is None, "all ranks still say the same to one another"


def test_collectives_in_another_order_are_named(layout_root, alone, ranks, tmp_path):
    """Every number is right, and the layout would hang where messages of two groups wait for each other."""
    config, count = run_of("v3", LAYOUT, layout_root, MASKED)
    task = "layout_faults:sums_in_an_order_of_their_own"
    proof = prove(config, count, tmp_path, ranks, expected=alone(config), task=task)
    assert proof.differences[0].error <= proof.tolerance
    assert not proof.holds
    (told,) = proof.diagnosis
    assert re.search(r"rank 0 issued all_reduce\(float32\[3\]\) on second .*, rank 1 issued .* on first", told), told


FAULTLESS = [LAYOUT, SPLIT, PIPELINE, Case("context=2"), Case("data_replicate=2")]
FAULTLESS += [Case("pipeline=2 data_shard=2 tensor=2 expert=4")]


def accused(case: Case, seed: int, layout_root: Path, alone: Any, ranks: Any, folder: Path) -> list[str]:
    config, count = run_of("v3", case, layout_root, MASKED, f"train.seed={seed}")
    return prove(config, count, folder, ranks, expected=alone(config)).diagnosis


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_accused_without_a_fault(seed, layout_root, alone, ranks, tmp_path):
    assert accused(LAYOUT, seed, layout_root, alone, ranks, tmp_path) == []


@pytest.mark.parametrize(
    ("case", "seed"),
    [
        pytest.param(case, seed, marks=mark, id=f"{case}-{seed}")
        for case in FAULTLESS
        for seed in range(20)
        for mark in [pytest.mark.slow if case is LAYOUT and seed < 6 else pytest.mark.matrix]
    ],
)
def test_nobody_is_accused_over_twenty_seeds(case, seed, layout_root, alone, ranks, tmp_path):
    assert accused(case, seed, layout_root, alone, ranks, tmp_path) == []
