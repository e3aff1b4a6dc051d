"""kernels/npu/ on the software NPU: results, gradients and shapes against the reference, and what torch_npu refuses."""

import pytest
import torch
from ascend_ranks import values

from octofold.backends.dotted import load_dotted
from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import PROVIDERS, Workload, choose

ROUNDINGS = {"bfloat16": 4, "float32": 16}
"""As tests/test_kernels_providers.py: few chained roundings, and in FP32 an error that grows with the sums."""
NPU_OPS = ["attention", "grouped_mm", "rms_norm", "rotary", "swiglu", "gate_topk", "permute", "unpermute"]


def why_unsupported(op: str, workload: Workload) -> str | None:
    function = load_dotted(f"{PROVIDERS[op]['npu']}:why_unsupported", "test")
    assert callable(function)
    reason: str | None = function(workload)
    return reason


@pytest.mark.parametrize("op", NPU_OPS)
def test_providers_are_chosen_on_ascend_and_nowhere_else(op):
    _, choices = choose(KernelsConfig(), Workload("npu", torch.bfloat16, (64, 32)))
    assert {choice.op: choice.provider for choice in choices}[op] == "npu"
    assert why_unsupported(op, Workload("npu", torch.bfloat16)) is None
    assert "on cuda" in str(why_unsupported(op, Workload("cuda", torch.bfloat16)))
    assert "bfloat16" in str(why_unsupported(op, Workload("npu", torch.float64)))


def test_long_rows_are_not_for_the_grouped_product():
    assert "65536" in str(why_unsupported("grouped_mm", Workload("npu", torch.bfloat16, (128, 65536))))


@pytest.mark.parametrize(
    ("experts", "groups", "reason"),
    [(256, 8, None), (2048, 1, None), (2049, 1, "at most 2048"), (8, 4, "at least 3"), (640, 80, "2560")],
)
def test_gates_that_the_operator_does_not_take(experts, groups, reason):
    workload = Workload("npu", torch.bfloat16, experts=experts, expert_groups=groups)
    found = why_unsupported("gate_topk", workload)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.ascend
def test_gates_choose_what_the_reference_chooses():
    assert values("ascend_provider_tasks:choices") == [[True] * 5]


@pytest.mark.ascend
def test_results_and_gradients_are_the_references():
    (found,) = values("ascend_provider_tasks:roundings")
    assert {name.split()[0] for name in found} == set(NPU_OPS)
    for name, errors in found.items():
        assert all(error <= ROUNDINGS[name.split()[-1]] for error in errors), (name, errors)


@pytest.mark.ascend
def test_more_documents_than_one_call_takes():
    (errors,) = values("ascend_provider_tasks:many_documents")
    assert len(errors) == 4
    assert max(errors) <= ROUNDINGS["float32"]


@pytest.mark.ascend
def test_shapes_by_the_meta_kernels_of_torch_npu():
    (found,) = values("ascend_provider_tasks:fakes")
    assert {name.split()[0] for name in found} == set(NPU_OPS)
    assert all(found.values()), found


@pytest.mark.ascend
def test_what_torch_npu_refuses():
    group, tokens, indices, places = values("ascend_provider_tasks:illegal")[0]
    assert "group_type only supports -1, 0 and 2" in group
    assert "tokens should be 2 dimensional" in tokens
    assert "indices should be 2 or 1 dimensional" in indices
    assert "sorted_indices should be 1 dimensional" in places
