"""Every layout computes what one rank computes: tiny DeepSeek-V2 and V3 over gloo ranks, in FP64 to 1e-9."""

import pytest
from layout_cases import DEFAULT, MODELS, run_of

from octofold.train.layout.prove import prove


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_layout_equals_one_rank(case, model, layout_root, alone, ranks, tmp_path):
    config, count = run_of(model, case, layout_root)
    proof = prove(config, count, tmp_path, ranks, expected=alone(config), task="layout_cases:record_again")
    assert proof.holds, "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])
    assert len(proof.differences) > 200
