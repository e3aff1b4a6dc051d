"""The route through DeepEP, on a stand-in for the library (fake_deep_ep.py), computes what local experts do."""

from dataclasses import replace
from typing import Any

import expert_tasks
import pytest
import torch
from expert_tasks import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from run_configs import tiny_run, write_corpus
from test_parallel_expert import CASES, assert_as_local, case_of, routings

from octofold.backends.errors import ConfigError
from octofold.kernels.qtensor import Format
from octofold.parallel.expert_deepep import why_unsupported
from octofold.parallel.transport import Transport

DEEPEP: dict[str, Any] = {"name": "deepep"}
WEIGHTS = {"rtol": 1e-6, "atol": 1e-6}
"""The library carries weights of the gate, and their gradients, in FP32."""


def exact_in_fp32(case: Case) -> Case:
    return replace(case, gate=[gate.float().double() for gate in case.gate])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [2, 4])
def test_as_local_experts(ranks, n, case):
    assert_as_local(ranks(n), exact_in_fp32(case_of(CASES[case][:n])), DEEPEP, WEIGHTS)


@settings(max_examples=15)
@given(data=st.data())
def test_any_routing(ranks, data):
    assert_as_local(ranks(4), exact_in_fp32(case_of(data.draw(routings(4)))), DEEPEP, WEIGHTS)


def test_overlap_changes_no_bit(ranks):
    case = case_of(CASES["uneven"][:2])
    on, off = (ranks(2).run(expert_tasks.split, case, {**DEEPEP, "overlap": overlap}) for overlap in (True, False))
    for a, b in zip(on, off, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("y", "x", "gate", *case.weights))


@pytest.mark.parametrize("transport", [Transport(), Transport(Format((1, 128)), Format((1, 128)))], ids=["bf16", "fp8"])
def test_rows_travel_as_those_of_the_flat_route(ranks, transport):
    """The same rows reach the same experts; sums over a token's experts are rounded elsewhere, gradients travel in
    BF16."""
    case = case_of(CASES["every expert"][:4], torch.bfloat16, width=256, std=0.1)
    flat = ranks(4).run(expert_tasks.split, case, {"name": "flat", "transport": transport})
    found = ranks(4).run(expert_tasks.split, case, {**DEEPEP, "transport": transport})
    for name, allowed in {"y": 2**-7, "x": 2**-4, "gate": 2**-4}.items():
        a, b = (torch.cat([f[name].flatten() for f in route]).double() for route in (found, flat))
        assert (a - b).norm() < allowed * b.norm(), name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("deepep"), documents=1)


@pytest.mark.parametrize(
    ("precision", "rule"),
    [
        ({"name": "fp64"}, "DeepEP moves BF16 and E4M3, no wider numbers"),
        ({"name": "fp32"}, "DeepEP moves BF16 and E4M3, no wider numbers"),
        ({"name": "fp8_block", "block": 64}, "whole tiles of 128 numbers"),
        ({"name": "mxfp8"}, "whole tiles of 128 numbers"),
        ({"name": "bf16", "dispatch": "fp8"}, "whole tiles of 128 numbers"),
    ],
    ids=str,
)
def test_what_the_library_does_not_move_is_refused_before_the_start(precision, rule, root):
    with pytest.raises(ConfigError, match=f"parallel.expert_route=deepep.*\n.*{rule}"):
        tiny_run(root, 2, parallel={"expert": 2, "expert_route": "deepep"}, precision=precision)


@pytest.mark.parametrize(
    ("hidden", "precision"),
    [
        (64, {"name": "bf16"}),
        (64, {"name": "fp8_block", "block": 64, "dispatch": "bf16"}),
        (256, {"name": "fp8_block"}),
        (256, {"name": "fp8_tensor_current"}),
    ],
    ids=str,
)
def test_what_the_library_moves(hidden, precision, root):
    route = {"expert": 2, "expert_route": "deepep"}
    tiny_run(root, 2, model={"hidden_size": hidden}, parallel=route, precision=precision)


def test_refused_where_it_cannot_be():
    assert "the run is on cpu" in (why_unsupported("cpu") or "")
    assert "deep_ep is not installed" in (why_unsupported("cuda") or "")
