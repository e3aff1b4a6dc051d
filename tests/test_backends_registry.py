"""Backends by name, what the CPU says of itself, and names of a user's own parts."""

from importlib.util import find_spec

import pytest
import torch

from octofold.backends.base import Backend
from octofold.backends.config import BackendConfig, check
from octofold.backends.cpu import CpuBackend, usable_cores
from octofold.backends.cuda import CudaBackend
from octofold.backends.dotted import is_dotted, load_dotted
from octofold.backends.errors import ConfigError
from octofold.backends.registry import BACKENDS, load, resolve

NO_CUDA = CudaBackend().why_unavailable()


def test_auto_takes_the_first_available():
    assert list(BACKENDS) == ["ascend", "cuda", "cpu"]
    assert resolve("auto").name == ("cpu" if NO_CUDA else "cuda")
    assert isinstance(resolve("cpu"), CpuBackend)


@pytest.mark.skipif(NO_CUDA is None, reason="this machine has an NVIDIA GPU")
def test_a_named_backend_that_cannot_run_here_stops_with_the_reason():
    with pytest.raises(ConfigError) as caught:
        resolve("cuda")
    message = str(caught.value)
    assert message.startswith("backend.name=cuda\n  rule:   the named backend must be able to run here: torch ")
    assert "without CUDA" in message or "finds no NVIDIA GPU" in message
    assert caught.value.remedy == "backend=auto"
    assert isinstance(load("cuda"), CudaBackend), "asking for it by name is no error"


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_ascend_without_torch_npu_says_so():
    with pytest.raises(ConfigError, match=r"backend\.name=ascend\n.*torch_npu is not installed\n"):
        resolve("ascend")


def test_only_ascend_has_a_software_twin():
    check(BackendConfig("ascend", software=True), 1)
    with pytest.raises(ConfigError) as caught:
        check(BackendConfig("cpu", software=True), 1)
    assert str(caught.value).startswith("backend.software=true backend.name=cpu\n")
    assert caught.value.remedy == "backend=ascend, or backend.software=false"


def test_an_unknown_backend_suggests_the_nearest():
    with pytest.raises(ConfigError) as caught:
        resolve("cudda")
    assert caught.value.remedy == "backend.name=cuda"
    assert "auto, ascend, cuda, cpu" in caught.value.rule


def test_a_backend_of_the_users_own():
    assert isinstance(resolve("octofold.backends.cpu:CpuBackend"), CpuBackend)
    with pytest.raises(ConfigError, match="a class derived from"):
        resolve("octofold.backends.cpu:usable_cores")


def test_what_the_cpu_says_of_itself():
    backend: Backend = CpuBackend()
    capabilities = backend.capabilities(0)
    assert "CPU" in capabilities.device_name
    assert not capabilities.fp8
    assert isinstance(capabilities.bf16, bool)
    assert 2**27 < backend.peak_memory_bytes() < capabilities.memory_bytes < 2**50
    assert backend.device(3) == torch.device("cpu")
    assert backend.collective_library == "gloo"


@pytest.mark.parametrize(
    ("local_world_size", "threads", "expected"), [(1, 0, usable_cores()), (10**6, 0, 1), (1, 3, 3), (4, 2, 2)]
)
def test_cores_are_divided_among_local_ranks(local_world_size, threads, expected):
    before = torch.get_num_threads()
    CpuBackend().set_up(0, local_world_size, threads)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == expected


def test_dotted_names():
    assert is_dotted("json:loads")
    assert not is_dotted("json.loads")
    assert load_dotted("posixpath:join", "x.name").__name__ == "join"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("no_such_package.deep:f", "no module named no_such_package"), ("json:no_such", "json has no no_such")],
)
def test_dotted_names_that_lead_nowhere(name, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        load_dotted(name, "x.name")
    assert str(caught.value).startswith(f"x.name={name}\n")
