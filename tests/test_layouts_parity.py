"""Every layout computes what one rank computes: tiny DeepSeek-V2 and V3 over gloo ranks, in FP64 to 1e-9."""

from dataclasses import replace

import pytest
from layout_cases import DEFAULT, FULL, MODELS, Case, run_of

from octofold.train.layout.prove import FP8_BAR, FP8_GROUP_BAR, Fp8Proof, prove, prove_fp8
from octofold.train.precision.config import PrecisionConfig


# Of the older family every single degree; with several, what is its own is what pairs of them prove for the newer.
@pytest.mark.parametrize(
    ("model", "case"),
    [
        pytest.param(model, case, id=f"{case}-{model}", marks=pytest.mark.slow if model == "v2" and several else ())
        for case in DEFAULT
        for several in [" " in case.degrees]
        for model in MODELS
    ],
)
def test_layout_equals_one_rank(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root)
    proof = prove(config, count, tmp_path, ranks, expected=alone(config))
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
    assert len(proof.differences) > 200


# On V3 every third is among the slow proofs.
@pytest.mark.parametrize(
    ("case", "model"),
    [
        pytest.param(
            case,
            model,
            marks=pytest.mark.slow if model == "v3" and not n % 3 else pytest.mark.matrix,
            id=f"{case}-{model}",
        )
        for model in ("v3", "v2")
        for n, case in enumerate(FULL)
    ],
)
def test_full_matrix(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root, "data.mask_documents=true")
    proof = prove(config, count, tmp_path, ranks, expected=alone(config))
    if model == MODELS[-1]:
        # Each layout has groups of its own, and each of gloo's keeps threads that poll: end them with their ranks.
        ranks(count).close()
    worst = proof.differences[0]
    print(f"{model}  {'yes' if proof.holds else 'NO '}  {worst.error:.1e}  {count} ranks  {case}  ({worst.key})")
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])


IN_FP8 = ["expert=4 expert_route=two_stage", "expert=2", "tensor=2", "context=2", "pipeline=2", "data_replicate=2"]
IN_FP8 += ["data_shard=2 expert=2", "expert=2 expert_tensor=2", "pipeline=2 data_shard=2 tensor=2 expert=4"]
"""Layouts of which FP8 is measured; those that split experts send their tokens in FP8."""


@pytest.mark.parametrize("degrees", [IN_FP8[0], *(pytest.param(text, marks=pytest.mark.slow) for text in IN_FP8[1:])])
def test_fp8_errs_no_more_than_on_one_rank(degrees, layout_root, ranks, tmp_path):
    config, count = run_of("v3", Case(degrees), layout_root)
    precision = PrecisionConfig("fp8_block", arithmetic="emulate", block=16)
    proof = prove_fp8(replace(config, precision=precision), count, tmp_path, ranks)
    print(f"{degrees}: {proof.layout:.4%} against FP64, {proof.one_rank:.4%} on one rank; by kind {proof.kinds}")
    assert len(proof.kinds) == 7
    assert all(0.001 < one_rank < 0.5 for one_rank in (proof.one_rank, *(b for _, b in proof.kinds.values())))
    assert proof.holds, f"{proof.layout / proof.one_rank} above {FP8_BAR}, or {proof.worst_kind} above {FP8_GROUP_BAR}"


def test_a_kind_of_parameters_has_a_bar_of_its_own():
    """Gates summed twice would drown among all parameters."""
    assert Fp8Proof(0.11, 0.1, {"gates": (0.14, 0.1), "head": (0.1, 0.1)}).holds
    doubled = Fp8Proof(0.11, 0.1, {"gates": (1.1, 0.1), "head": (0.1, 0.1)})
    assert (doubled.holds, doubled.worst_kind) == (False, "gates")
    assert not Fp8Proof(0.13, 0.1, {"gates": (0.1, 0.1)}).holds


@pytest.mark.matrix
@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_fp32_smoke(case, layout_root, ranks, tmp_path):
    config, count = run_of("v3", case, layout_root)
    single = replace(config, precision=PrecisionConfig("fp32"))
    proof = prove(single, count, tmp_path, ranks)
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
