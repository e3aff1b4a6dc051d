"""`octofold doctor`: Python, torch and its extensions, CUDA and NCCL."""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from octofold.launch.doctor_finding import FAIL, WARN, Check, Finding, Problem, Surroundings, ok
from octofold.launch.doctor_matrix import CUDA_DRIVERS, NCCL_RENAMED, PYTHON, TORCH
from octofold.launch.doctor_pci import GPU_CLASSES, NVIDIA_VENDOR, pci_devices
from octofold.launch.doctor_probe import AUTOLOAD

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
REQUIRED = ("numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "datasets")


def installed(name: str) -> str | None:
    """Version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 8.3.RC1 is (8, 3)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


OLD_PYTHON = Problem(FAIL, "Python {found} is older than {least}", "make the environment with Python {least} or newer")
LACKING = Problem(
    FAIL, "{names} not installed", "pip install -c constraints/base.txt -e . in this environment ({prefix})"
)


def check_python(here: Surroundings) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        yield OLD_PYTHON.found(found=found, least=".".join(map(str, PYTHON)))
    else:
        yield ok(f"{found} ({sys.executable})")
    missing = [name for name in REQUIRED if installed(name) is None]
    if missing:
        yield LACKING.found(names=", ".join(missing), prefix=sys.prefix)


NO_TORCH = Problem(FAIL, "torch is not installed", "pip install -c constraints/base.txt -e .")
OTHER_TORCH = Problem(
    FAIL, "torch {found} is not {wanted}, which this version needs", "pip install -c constraints/base.txt -e ."
)
BROKEN_TORCH = Problem(
    FAIL, "import torch fails: {error}", "install torch anew: pip install --force-reinstall torch=={wanted}.*"
)
BROKEN_EXTENSION = Problem(
    FAIL,
    "import torch fails in an extension that it loads ({names}): {error}",
    "torch_npu: install CANN and source its set_env.sh; or uninstall the extension, or set " + AUTOLOAD + "=0",
)


def check_torch(here: Surroundings) -> Iterator[Finding]:
    wanted = ".".join(map(str, TORCH))
    found = here.torch.version or installed("torch")
    if here.torch.error and here.torch.version:
        names = ", ".join(entry.name for entry in entry_points(group="torch.backends")) or "unknown"
        yield BROKEN_EXTENSION.found(names=names, error=here.torch.error)
    elif here.torch.error and (found or "No module named 'torch'" not in here.torch.error):
        yield BROKEN_TORCH.found(error=here.torch.error, wanted=wanted)
    if found is None:
        if here.torch.error and "No module named 'torch'" in here.torch.error:
            yield NO_TORCH.found()
    elif numbers(found)[:2] != TORCH:
        yield OTHER_TORCH.found(found=found, wanted=wanted)
    elif not here.torch.error:
        yield ok(found)


NO_DRIVER = Problem(
    FAIL, "{count} NVIDIA GPU(s) on the PCI bus, and no driver", "install NVIDIA's driver; in a container: --gpus all"
)
BUILD_WITHOUT = Problem(
    WARN,
    "the NVIDIA driver {driver} is here, and torch {torch} is built without CUDA",
    "install torch's CUDA build of the same version",
)
OLD_DRIVER = Problem(
    FAIL,
    "driver {driver} is older than {least}, which CUDA {cuda} needs",
    "install a newer driver, or torch for an older CUDA",
)
NO_GPU = Problem(
    FAIL,
    "driver {driver} is here, and torch sees no GPU (CUDA_VISIBLE_DEVICES={visible})",
    "unset CUDA_VISIBLE_DEVICES; in a container: start it with --gpus all; then nvidia-smi must list them",
)
NO_ANSWER = Problem(FAIL, "GPUs do not answer: {error}", "nvidia-smi; a GPU that fell off the bus needs a reset")
RENAMED = Problem(WARN, "{name} is not read by this torch", "set {other} instead")


def check_cuda(here: Surroundings) -> Iterator[Finding]:
    cuda, torch = here.torch.said.get("cuda_build"), here.torch.version
    driver = _driver()
    gpus_there = pci_devices(NVIDIA_VENDOR, GPU_CLASSES)
    if not driver:
        yield NO_DRIVER.found(count=gpus_there) if gpus_there else ok("no NVIDIA GPU is here")
    elif torch and not cuda:
        yield BUILD_WITHOUT.found(driver=driver, torch=torch)
    elif torch and cuda:
        least = CUDA_DRIVERS.get(numbers(cuda)[0])
        if least and numbers(driver)[:2] < least:
            yield OLD_DRIVER.found(driver=driver, least=".".join(map(str, least)), cuda=cuda)
        elif error := here.torch.said.get("cuda", {}).get("error"):
            yield NO_ANSWER.found(error=error)
        elif not here.torch.devices("cuda"):
            yield NO_GPU.found(driver=driver, visible=here.environ.get("CUDA_VISIBLE_DEVICES", "not set"))
        else:
            gpus = here.torch.devices("cuda")
            yield ok(f"driver {driver}, CUDA {cuda}, NCCL {here.torch.said.get('nccl')}, {len(gpus)} x {gpus[0]}")
    for name, other in NCCL_RENAMED.items():
        if name in here.environ:
            yield RENAMED.found(name=name, other=other)


def _driver() -> str | None:
    if not NVIDIA_DRIVER.is_file():
        return None
    found = re.search(r"Kernel Module\D+?(?:x86_64|aarch64)?\s+(\d+\.\d+(?:\.\d+)?)", NVIDIA_DRIVER.read_text())
    return found[1] if found else "of unknown version"


CHECKS = (
    Check("python", "Python's version, and what Octofold imports", check_python, (OLD_PYTHON, LACKING)),
    Check(
        "torch",
        "torch's version, and whether it can be imported, in a process of its own",
        check_torch,
        (NO_TORCH, OTHER_TORCH, BROKEN_TORCH, BROKEN_EXTENSION),
    ),
    Check(
        "cuda",
        "NVIDIA driver against torch's CUDA, GPUs, NCCL and its environment",
        check_cuda,
        (NO_DRIVER, BUILD_WITHOUT, OLD_DRIVER, NO_GPU, NO_ANSWER, RENAMED),
    ),
)
