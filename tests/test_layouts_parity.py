"""Every layout computes what one rank computes: tiny DeepSeek-V2 and V3 over gloo ranks, in FP64 to 1e-9."""

import pytest
from layout_cases import DEFAULT, FULL, MODELS, run_of

from octofold.train.layout.prove import prove


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_layout_equals_one_rank(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root)
    proof = prove(config, count, tmp_path, ranks, expected=alone(config), task="layout_cases:record_again")
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
    assert len(proof.differences) > 200


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_full_matrix(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root, "data.mask_documents=true")
    proof = prove(config, count, tmp_path, ranks, expected=alone(config), task="layout_cases:record_again")
    worst = proof.differences[0]
    print(f"{model}  {'yes' if proof.holds else 'NO '}  {worst.error:.1e}  {count} ranks  {case}  ({worst.key})")
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
