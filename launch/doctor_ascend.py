"""`octofold doctor`: torch_npu, CANN, the Ascend driver and the chip."""

import os
from collections.abc import Iterable, Iterator

from octofold.backends.ascend_soc import capabilities
from octofold.backends.errors import UserError
from octofold.backends.software_npu.activate import is_active
from octofold.launch.doctor_ascend_files import (
    cann_home,
    cann_version,
    device_files,
    driver_file,
    driver_version,
    has_operators,
    unsourced_cann,
)
from octofold.launch.doctor_finding import FAIL, WARN, Check, Finding, Problem, Surroundings, ok
from octofold.launch.doctor_matrix import CANN_DRIVERS, TORCH_NPU_CANN
from octofold.launch.doctor_torch import installed, numbers

ABSENT = "nothing of Ascend is here"
STOOD_IN_FOR = "the software NPU stands in for it (docs/ascend.md)"

NO_TORCH_NPU = Problem(WARN, "an Ascend device or CANN is here, and torch_npu is not", "pip install -e '.[ascend]'")
MISMATCH = Problem(
    FAIL, "torch_npu {npu} is built for torch {npu_torch}, and torch is {torch}", "pip install torch-npu=={torch}"
)
OTHER_NPU = Problem(WARN, "torch_npu {npu} is not in Octofold's matrix ({known})", "pip install -e '.[ascend]'")


def check_torch_npu(here: Surroundings) -> Iterator[Finding]:
    npu, torch = installed("torch-npu"), here.torch.version or installed("torch")
    if not npu:
        yield NO_TORCH_NPU.found() if here.ascend else ok(ABSENT)
        return
    if torch and numbers(npu)[:3] != numbers(torch)[:3]:
        plain = ".".join(map(str, numbers(torch)))
        yield MISMATCH.found(npu=npu, npu_torch=".".join(map(str, numbers(npu)[:3])), torch=plain)
    elif numbers(npu)[:2] not in TORCH_NPU_CANN:
        yield OTHER_NPU.found(npu=npu, known=_shown(TORCH_NPU_CANN))
    else:
        yield ok(npu)


NO_CANN = Problem(
    FAIL, "torch_npu is installed, and CANN is not found", "install CANN {wanted}, then source its set_env.sh"
)
UNSOURCED = Problem(
    FAIL, "CANN is in {place}, and the environment does not name it", "source {place}/set_env.sh (or ../set_env.sh)"
)
NO_FOLDER = Problem(
    FAIL, "the environment names CANN in {place}, which is no folder", "source the set_env.sh of a CANN that is there"
)
NO_VERSION = Problem(WARN, "{place} does not tell its version", "install CANN anew, or source another set_env.sh")
OTHER_CANN = Problem(
    FAIL,
    "CANN {cann} does not go with torch_npu {npu}, which takes {known}",
    "install CANN {wanted}, and source its set_env.sh",
)
NO_LIBRARIES = Problem(FAIL, "LD_LIBRARY_PATH names no folder of {place}", "source the set_env.sh of that CANN")
NO_OPERATORS = Problem(
    WARN,
    "{place} holds no compiled operators",
    "install Ascend-cann-CHIP-ops (before CANN 8.5: Ascend-cann-kernels-CHIP)",
)


def check_cann(here: Surroundings) -> Iterator[Finding]:
    if is_active(here.environ):
        yield ok(STOOD_IN_FOR)
        return
    npu, home = installed("torch-npu"), cann_home(here.environ)
    known = TORCH_NPU_CANN.get(numbers(npu)[:2], ()) if npu else ()
    wanted = ".".join(map(str, known[0])) if known else "as torch_npu's release notes say"
    if home is None:
        usual = unsourced_cann()
        if usual:
            yield UNSOURCED.found(place=usual)
        else:
            yield NO_CANN.found(wanted=wanted) if npu else ok("no CANN")
        return
    if not home.is_dir():
        yield NO_FOLDER.found(place=home)
        return
    cann = cann_version(home)
    if cann is None:
        yield NO_VERSION.found(place=home)
    elif known and numbers(cann)[:2] not in known:
        yield OTHER_CANN.found(cann=cann, npu=npu, known=_shown(known), wanted=wanted)
    else:
        yield ok(f"{cann} ({home})")
    real = os.path.realpath(home)
    libraries = [path for path in here.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    # In some releases home/lib64 is a link that leads out of home.
    if not any(path.startswith(str(home)) or os.path.realpath(path).startswith(real) for path in libraries):
        yield NO_LIBRARIES.found(place=home)
    if not has_operators(home):
        yield NO_OPERATORS.found(place=home)


NO_DRIVER = Problem(
    FAIL, "no Ascend driver is found", "install the driver (Ascend HDK); in a container: mount /usr/local/Ascend/driver"
)
OTHER_DRIVER = Problem(
    FAIL,
    "driver {driver} does not go with CANN {cann}, which takes {known}",
    "install a driver (Ascend HDK) of {known}",
)
NO_DEVICE = Problem(
    FAIL,
    "the driver {driver} is here, and no /dev/davinciN",
    "npu-smi info; in a container: pass --device /dev/davinci0 … and davinci_manager, devmm_svm, hisi_hdc",
)
FORBIDDEN = Problem(
    FAIL, "{device} may not be read and written", "join the group that owns it (HwHiAiUser), or run as root"
)


def check_driver(here: Surroundings) -> Iterator[Finding]:
    if is_active(here.environ):
        yield ok(STOOD_IN_FOR)
        return
    path, home = driver_file(here.environ), cann_home(here.environ)
    if path is None:
        yield NO_DRIVER.found() if here.ascend else ok(ABSENT)
        return
    driver = driver_version(path) or "of unknown version"
    cann = cann_version(home) if home else None
    known = CANN_DRIVERS.get(numbers(cann)[:2]) if cann else None
    devices = device_files()
    if known and numbers(driver)[:2] not in known:
        yield OTHER_DRIVER.found(driver=driver, cann=cann, known=_shown(known))
    elif known or not cann:
        yield ok(f"{driver} ({path})")
    else:
        yield ok(f"{driver} ({path}); which drivers CANN {cann} takes, its release notes say")
    if not devices:
        yield NO_DEVICE.found(driver=driver)
    for device in devices:
        if not os.access(device, os.R_OK | os.W_OK):
            yield FORBIDDEN.found(device=device)
            return


UNKNOWN_SOC = Problem(FAIL, "{error}", "{remedy}")
NO_NPU = Problem(
    FAIL,
    "{count} /dev/davinciN are here, and torch sees no NPU (ASCEND_RT_VISIBLE_DEVICES={visible})",
    "unset ASCEND_RT_VISIBLE_DEVICES; then npu-smi info must list them; source CANN's set_env.sh",
)
SILENT_NPU = Problem(FAIL, "torch_npu does not reach its devices: {error}", "npu-smi info; source CANN's set_env.sh")


def check_soc(here: Surroundings) -> Iterator[Finding]:
    devices, error = here.torch.devices("npu"), here.torch.said.get("npu", {}).get("error")
    if error:
        yield SILENT_NPU.found(error=error)
    elif not devices and device_files() and cann_home(here.environ) and installed("torch-npu") and here.torch.version:
        visible = here.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        yield NO_NPU.found(count=len(device_files()), visible=visible)
    elif not devices:
        yield ok("torch sees no NPU" if here.ascend else ABSENT)
    else:
        try:
            able = capabilities(devices[0], 0)
        except UserError as unknown:
            yield split(UNKNOWN_SOC, unknown)
            return
        fp8 = "" if able.fp8 else "; precision=fp8_* needs precision.arithmetic=storage or emulate"
        kind = "software NPU as " if is_active(here.environ) else ""
        yield ok(f"{len(devices)} x {kind}{able.device_name}: {', '.join(able.native())}{fp8}")


def split(problem: Problem, error: UserError) -> Finding:
    """A user's error as a finding: what and rule, and the remedy."""
    what, _, remedy = str(error).partition("\n  remedy: ")
    return problem.found(error=what.replace("\n  rule:   ", "; rule: "), remedy=remedy)


def _shown(versions: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(".".join(map(str, version)) for version in versions)


CHECKS = (
    Check("torch_npu", "torch_npu against torch", check_torch_npu, (NO_TORCH_NPU, MISMATCH, OTHER_NPU)),
    Check(
        "cann",
        "CANN where ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME says, against torch_npu; its libraries and operators",
        check_cann,
        (NO_CANN, UNSOURCED, NO_FOLDER, NO_VERSION, OTHER_CANN, NO_LIBRARIES, NO_OPERATORS),
    ),
    Check(
        "ascend driver",
        "the Ascend driver against CANN, and the device files",
        check_driver,
        (NO_DRIVER, OTHER_DRIVER, NO_DEVICE, FORBIDDEN),
    ),
    Check("soc", "the chip, and what it multiplies natively", check_soc, (UNKNOWN_SOC, NO_NPU, SILENT_NPU)),
)
