"""Every layout computes what one rank computes: tiny DeepSeek-V2 and V3 over gloo ranks, in FP64 to 1e-9."""

from dataclasses import replace

import pytest
from layout_cases import DEFAULT, FULL, MODELS, Case, run_of

from octofold.train.layout.prove import FP8_BAR, prove, prove_fp8
from octofold.train.precision.config import PrecisionConfig


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_layout_equals_one_rank(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root)
    proof = prove(config, count, tmp_path, ranks, expected=alone(config))
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
    assert len(proof.differences) > 200


@pytest.mark.parametrize(
    "model", [pytest.param("v3", marks=pytest.mark.slow), pytest.param("v2", marks=pytest.mark.matrix)]
)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_matrix(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root, "data.mask_documents=true")
    proof = prove(config, count, tmp_path, ranks, expected=alone(config))
    if model == MODELS[-1]:
        # Each layout has groups of its own, and each of gloo's keeps threads that poll: end them with their ranks.
        ranks(count).close()
    worst = proof.differences[0]
    print(f"{model}  {'yes' if proof.holds else 'NO '}  {worst.error:.1e}  {count} ranks  {case}  ({worst.key})")
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])


IN_FP8 = ["expert=2", "tensor=2", "context=2", "data_shard=2 expert=2"]
"""Layouts of which FP8 is measured; `ranks` of experts send their tokens in FP8."""


@pytest.mark.parametrize("degrees", [IN_FP8[0], *(pytest.param(text, marks=pytest.mark.slow) for text in IN_FP8[1:])])
def test_fp8_errs_no_more_than_on_one_rank(degrees, layout_root, ranks, tmp_path):
    config, count = run_of("v3", Case(degrees), layout_root)
    precision = PrecisionConfig("fp8_block", arithmetic="emulate", block=16)
    proof = prove_fp8(replace(config, precision=precision), count, tmp_path, ranks)
    print(f"{degrees}: {proof.layout:.4%} against FP64, {proof.one_rank:.4%} on one rank")
    assert 0.001 < proof.one_rank < 0.5, "FP8 was on the way"
    assert proof.holds, f"{proof.layout / proof.one_rank} above {FP8_BAR}"


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_fp32_smoke(case, layout_root, ranks, tmp_path):
    config, count = run_of("v3", case, layout_root)
    single = replace(config, precision=PrecisionConfig("fp32"))
    proof = prove(single, count, tmp_path, ranks)
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
