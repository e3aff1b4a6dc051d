"""torch_npu's own operators on the software NPU: results and gradients of the documented formulas."""

import pytest
from ascend_ranks import values

pytestmark = pytest.mark.ascend

TENSORS = {"rms_norm": 3, "swiglu": 2, "rotary_mul": 2, "token_permute": 2, "grouped_matmul": 2}
"""Results and gradients that are compared."""


def test_operators_and_their_gradients():
    (found,) = values("ascend_op_tasks:operators")
    assert {name: len(errors) for name, errors in found.items()} == TENSORS
    for name, errors in found.items():
        assert max(errors) < 1e-6, (name, errors)


def test_what_has_no_kernel_fails_instead_of_returning_nothing():
    ((argument, operator),) = values("ascend_op_tasks:unknown")
    assert "npu_grouped_matmul split_item=0" in argument
    assert "remedy: add them there" in argument
    assert "aclnnMoeGatingTopK" in operator
