"""Layouts at the edges: experts without tokens, one with all, one token a rank, packed documents, ranks that have
different numbers of labels that count, or none."""

import pytest
from layout_cases import Case, run_of

from octofold.train.layout.prove import RECORD, facts, one_rank, prove

ONE_EXPERT = ["model.num_experts_per_tok=1", "model.n_group=1", "model.topk_group=1"]
EDGES = [
    pytest.param("v3", Case("data_shard=4 expert=4", 1), "layout_edges:most_experts_empty", [], id="empty experts"),
    pytest.param("v3", Case("expert=2", 4), "layout_edges:everything_to_one_expert", ONE_EXPERT, id="one expert"),
    pytest.param("v3", Case("tensor=2 expert=2", 1), RECORD, ["data.sequence_length=2"], id="one token"),
    pytest.param(
        "v3",
        Case("data_shard=2 context=2", 1),
        "layout_edges:unequal_counts",
        ["data.mask_documents=true"],
        id="packed documents over context ranks, unequal counts",
    ),
    pytest.param(
        "v2",
        Case("data_shard=4 expert=2", 1),
        "layout_edges:unequal_counts",
        ["data.mask_documents=true", "train.global_batch_size=16"],
        id="accumulation over four micro-batches, unequal counts",
    ),
    pytest.param(
        "v3", Case("data_shard=4 expert=2", 1), "layout_edges:a_rank_without_labels", [], id="a rank without labels"
    ),
    pytest.param(
        "v3",
        Case("pipeline=2 data_shard=4", 1),
        "layout_edges:a_rank_without_labels",
        ["train.global_batch_size=16"],
        id="a pipeline without labels",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("model", "case", "task", "texts"), EDGES)
def test_edge(model, case, task, texts, layout_root, ranks, tmp_path):
    config, count = run_of(model, case, layout_root, *texts)
    (expected,) = facts(one_rank(config), 1, tmp_path / "alone", ranks, task)
    proof = prove(config, count, tmp_path, ranks, expected=expected, task=task)
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
    if task in ("layout_edges:most_experts_empty", "layout_edges:everything_to_one_expert"):
        loads = next(iter(expected.steps[0].loads.values()))
        assert (loads == 0).sum() >= 12
