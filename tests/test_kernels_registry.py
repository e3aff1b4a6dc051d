"""Choosing providers: the table with its reasons, and refusals that name the key, the reason and the remedy."""

import sys
from types import ModuleType

import pytest
import torch

from octofold.backends.errors import ConfigError
from octofold.kernels import cpu_attention, torch_grouped_mm
from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import Format
from octofold.kernels.reference import grouped_mm as reference_grouped_mm
from octofold.kernels.registry import FP8_OPS, PROVIDERS, Workload, choose

CPU = Workload("cpu", torch.bfloat16, (64, 32))
FP8_ON_CPU = Workload("cpu", torch.bfloat16, (64, 32), formats=(Format((1, 128)),))


def test_auto_takes_the_first_that_supports_the_workload():
    kernels, choices = choose(KernelsConfig(), FP8_ON_CPU)
    others = {"triton": "NVIDIA", "npu": "Ascend"}
    first = {op: next(name for name in providers if name not in others) for op, providers in PROVIDERS.items()}
    assert {choice.op: choice.provider for choice in choices} == first
    assert all(others[name] in reason for choice in choices for name, reason in choice.rejected.items())
    assert kernels.attention is cpu_attention.attention


def test_a_run_without_fp8_has_no_rows_for_its_ops():
    _, choices = choose(KernelsConfig(), CPU)
    assert [choice.op for choice in choices] == [op for op in PROVIDERS if op not in FP8_OPS]
    assert {"quantize", "quantize_groups", "swiglu_quantize", "dequantize"} < set(FP8_OPS)


def test_auto_tells_why_it_passed_a_provider_by():
    _, choices = choose(KernelsConfig(), Workload("cuda", torch.float64, (64, 32)))
    table = {choice.op: choice for choice in choices}
    assert table["grouped_mm"].provider == "reference"
    assert table["grouped_mm"].rejected == {
        "cpu": "made for CPUs, the run is on cuda",
        "npu": "made for Ascend, the run is on cuda",
        "torch": "torch has no grouped product in torch.float64",
    }
    assert table["attention"].provider == "torch"
    assert table["swiglu"].rejected == {"npu": "made for Ascend, the run is on cuda"}


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Workload("cpu", torch.float64), "no grouped product in torch.float64"),
        (Workload("cuda", torch.float32), "takes BF16 only"),
        (Workload("cpu", torch.bfloat16, (64, 36, 20)), r"multiples of 8, got \[36, 20\]"),
        (Workload("cpu", torch.float32, (64, 30)), r"multiples of 4, got \[30\]"),
    ],
)
def test_a_named_provider_that_cannot_serve_stops_the_run(workload, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(KernelsConfig(grouped_mm="torch"), workload)
    assert str(caught.value).startswith("kernels.grouped_mm=torch\n  rule:   the provider must support the run: torch:")
    assert caught.value.remedy == "kernels.grouped_mm=auto"


def test_named_providers_are_honoured():
    kernels, choices = choose(KernelsConfig(attention="reference", grouped_mm="torch"), CPU)
    assert kernels.grouped_mm is torch_grouped_mm.grouped_mm
    assert [choice.provider for choice in choices][:4] == ["reference", "torch", "cpu", "torch"]


def test_an_unknown_provider_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"kernels.attention=referense\n") as caught:
        choose(KernelsConfig(attention="referense"), CPU)
    assert caught.value.remedy == "kernels.attention=reference"


def own_module(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """A module `own_kernels` as a user may have it on PYTHONPATH."""
    module = ModuleType("own_kernels")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "own_kernels", module)


def test_a_provider_of_the_users_own(monkeypatch):
    own_module(monkeypatch, product=reference_grouped_mm.grouped_mm, why_unsupported=lambda workload: None)
    kernels, choices = choose(KernelsConfig(grouped_mm="own_kernels:product"), CPU)
    assert kernels.grouped_mm is reference_grouped_mm.grouped_mm
    assert choices[1].provider == "own_kernels:product"
    own_module(monkeypatch, product=reference_grouped_mm.grouped_mm, why_unsupported=lambda workload: "no lid")
    with pytest.raises(ConfigError, match="own_kernels:product: no lid"):
        choose(KernelsConfig(grouped_mm="own_kernels:product"), CPU)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no_such_module:product", "no module named no_such_module"), ("own_kernels:product", "has no product")],
)
def test_a_provider_of_the_users_own_that_is_not_there(monkeypatch, name, reason):
    own_module(monkeypatch, why_unsupported=lambda workload: None)
    with pytest.raises(ConfigError, match=reason):
        choose(KernelsConfig(swiglu=name), CPU)
