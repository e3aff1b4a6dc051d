"""`octofold doctor` in broken environments: a torch that is wrong, dies, hangs or is absent; CANN and its versions."""

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import doctor_page
import pytest
from broken_sites import NO_HCCL, NPU_POINTS, ascend, distribution, package

from octofold.launch import doctor_ascend, doctor_ascend_files, doctor_pci, doctor_torch
from octofold.launch.cli import main
from octofold.launch.doctor import CHECKS
from octofold.launch.doctor_finding import Problem, Surroundings
from octofold.launch.doctor_probe import TorchFacts, ask_torch

ROOT = Path(__file__).resolve().parents[1]
RUN = "from octofold.launch.cli import main; raise SystemExit(main())"
OURS = str(ROOT / "tests/typing")


def environment(*sites: Path, **variables: str) -> dict[str, str]:
    """This process's, without what a job or another test has set, importing from `sites` before all else."""
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH")
    path = os.pathsep.join([*map(str, sites), OURS])
    return {**{name: os.environ[name] for name in kept if name in os.environ}, "PYTHONPATH": path, **variables}


def doctor(env, tmp_path, python=sys.executable):
    """Exit status and findings, by name, of the command in a process of its own."""
    command = [python, "-P", "-c", RUN, "doctor", "--json", str(tmp_path / "runs")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode in (0, 1), done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] == (done.returncode == 0)
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in said["findings"]:
        findings.setdefault(finding["name"], []).append(finding)
    return done.returncode, findings


def test_a_machine_without_an_accelerator_passes_every_check(tmp_path):
    status, found = doctor(environment(), tmp_path)
    assert status == 0, found
    assert list(found) == [check.name for check in CHECKS]
    (torch,) = found["torch"]
    assert (torch["status"], torch["remedy"]) == ("ok", "")
    assert torch["what"].startswith("2.13.")
    assert not (tmp_path / "runs").exists()


def test_an_interpreter_without_any_package(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    status, found = doctor(environment(), tmp_path, tmp_path / "bare/bin/python")
    assert status == 1
    assert found["torch"][0]["what"] == "torch is not installed"
    assert "hydra-core" in found["python"][1]["what"]
    assert found["cpu"][0]["status"] == "ok"


def test_a_torch_that_cannot_be_imported(tmp_path):
    site = package(tmp_path / "site", "torch", "raise OSError('libcudart.so.13: cannot open shared object file')\n")
    status, found = doctor(environment(site), tmp_path)
    assert status == 1
    (torch,) = found["torch"]
    assert torch["status"] == "fail"
    assert "libcudart.so.13" in torch["what"]
    assert "force-reinstall torch==2.13" in torch["remedy"]


@pytest.mark.parametrize(("code", "part"), [("import os; os.abort()", "signal 6"), ("raise SystemExit(3)", "status 3")])
def test_a_torch_that_takes_its_process_with_it(code, part, tmp_path):
    facts = ask_torch(environment(package(tmp_path, "torch", code)))
    assert (facts.version, part in str(facts.error)) == (None, True)


def test_a_torch_that_hangs_is_not_waited_for(tmp_path):
    facts = ask_torch(environment(package(tmp_path, "torch", "import time; time.sleep(60)")), limit_s=1.0)
    assert facts == TorchFacts({}, "it did not end within 1 s")


def test_torch_npu_without_cann_breaks_the_import_of_torch_and_is_named(tmp_path):
    site = package(tmp_path / "site", "torch_npu", NO_HCCL)
    distribution(site, "torch_npu", "2.13.0", NPU_POINTS)
    status, found = doctor(environment(site), tmp_path)
    assert status == 1
    torch = found["torch"][0]
    assert "extension that it loads (torch_npu)" in torch["what"]
    assert "libhccl.so" in torch["what"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in torch["remedy"]
    assert found["torch_npu"][0]["what"] == "2.13.0"
    assert "CANN 9.2" in found["cann"][0]["remedy"]
    assert found["ascend driver"][0]["status"] == "fail"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Surroundings with an environment of one's own; nothing of this machine's Ascend, if it has any, is seen."""
    monkeypatch.setattr(doctor_ascend_files, "ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(doctor_ascend_files, "DEVICES", tmp_path / "dev")

    def surroundings(environ, said=None, ascend=True):
        return Surroundings(environ, tmp_path, TorchFacts({"torch": "2.13.0"} if said is None else said), ascend)

    return surroundings


@pytest.fixture
def npu(tmp_path, monkeypatch):
    """Installs a version of torch_npu, as far as its metadata go."""

    def install(version):
        monkeypatch.syspath_prepend(str(distribution(tmp_path / f"npu-{version}", "torch_npu", version)))
        importlib.invalidate_caches()

    return install


def said_by(check, surroundings):
    """(status, what) of each finding of a check."""
    (named,) = [one for one in CHECKS if one.name == check]
    return [(finding.status, finding.what) for finding in named.findings(surroundings)]


def test_a_healthy_ascend_machine(here, npu, tmp_path):
    npu("2.13.0")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").touch()
    environ = ascend(tmp_path)
    said = {"torch": "2.13.0", "npu": {"devices": ["Ascend910_9392"] * 16}}
    surroundings = here(environ, said)
    home, driver = tmp_path / "Ascend/cann", tmp_path / "Ascend/driver/version.info"
    assert said_by("torch_npu", surroundings) == [("ok", "2.13.0")]
    assert said_by("cann", surroundings) == [("ok", f"9.2.0 ({home})")]
    assert said_by("ascend driver", surroundings)[0][1].startswith(f"26.1.0 ({driver})")
    ((status, what),) = said_by("soc", surroundings)
    assert status == "ok"
    assert what.startswith("16 x Ascend 910C (Ascend910_9392): BF16, INT8; precision=fp8_* needs precision.arithmetic")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.12.0", ("fail", "torch_npu 2.12.0 is built for torch 2.12.0, and torch is 2.13.0")),
        ("2.13.0.post1", ("ok", "2.13.0.post1")),
    ],
)
def test_torch_npu_against_torch(version, expected, here, npu):
    npu(version)
    assert said_by("torch_npu", here({})) == [expected]


def test_a_pair_outside_the_matrix_is_a_warning(here, npu):
    npu("2.99.0")
    assert said_by("torch_npu", here({}, {"torch": "2.99.0"}))[0][0] == "warn"


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"cann": "8.3.RC1"}, ["CANN 8.3.RC1 does not go with torch_npu 2.13.0, which takes 9.2, 9.1, 9.0, 8.5"]),
        ({"cann": None, "operators": False}, ["does not tell its version", "no compiled operators"]),
        ({"operators": False}, ["9.2.0", "no compiled operators"]),
    ],
)
def test_cann(files, parts, here, npu, tmp_path):
    npu("2.13.0")
    found = said_by("cann", here(ascend(tmp_path, **files)))
    assert len(found) == len(parts)
    for (_, what), part in zip(found, parts, strict=True):
        assert part in what


def test_cann_that_is_there_but_not_sourced(here, npu, tmp_path, monkeypatch):
    npu("2.13.0")
    assert said_by("cann", here({}))[0] == ("fail", "torch_npu is installed, and CANN is not found")
    environ = ascend(tmp_path)
    monkeypatch.setattr(doctor_ascend_files, "ROOT", tmp_path / "Ascend")
    assert "the environment does not name it" in said_by("cann", here({}))[0][1]
    assert said_by("cann", here({**environ, "LD_LIBRARY_PATH": "/lib"}))[1][1].startswith("LD_LIBRARY_PATH names no")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "Ascend/cann/lib64").symlink_to(tmp_path / "elsewhere")
    linked = {**environ, "LD_LIBRARY_PATH": str(tmp_path / "Ascend/cann/lib64")}
    assert [status for status, _ in said_by("cann", here(linked))] == ["ok"]
    assert "which is no folder" in said_by("cann", here({"ASCEND_TOOLKIT_HOME": str(tmp_path / "gone")}))[0][1]


def test_the_driver_against_cann_and_its_devices(here, tmp_path):
    environ = ascend(tmp_path, cann="9.1.0", driver="25.0.rc1")
    found = said_by("ascend driver", here(environ))
    assert found[0][1].startswith("driver 25.0.rc1 does not go with CANN 9.1.0, which takes 25.2, ")
    assert found[1][1] == "the driver 25.0.rc1 is here, and no /dev/davinciN"
    assert said_by("ascend driver", here({}))[0] == ("fail", "no Ascend driver is found")
    assert said_by("ascend driver", here({}, ascend=False)) == [("ok", doctor_ascend.ABSENT)]


@pytest.mark.parametrize(
    ("npu_said", "part"),
    [({"devices": ["Ascend310P3"]}, "SoC Ascend310P3; rule: a known chip"), ({"error": "E40021: driver"}, "E40021")],
)
def test_a_chip_that_is_unknown_or_silent(npu_said, part, here):
    ((status, what),) = said_by("soc", here({}, {"torch": "2.13.0", "npu": npu_said}))
    assert (status, part in what) == ("fail", True)


@pytest.mark.parametrize("visible", [None, "9"])
def test_devices_that_torch_does_not_see(visible, here, npu, tmp_path):
    npu("2.13.0")
    environ = ascend(tmp_path) | ({} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible})
    assert said_by("soc", here(environ)) == [("ok", "torch sees no NPU")]
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    shown = f"(ASCEND_RT_VISIBLE_DEVICES={visible or 'not set'})"
    expected = ("fail", f"2 /dev/davinciN are here, and torch sees no NPU {shown}")
    assert said_by("soc", here(environ)) == [expected]
    assert said_by("soc", here(environ, {"torch": "2.13.0", "npu": {"devices": []}})) == [expected]
    # Without CANN, or without a torch that says anything, other checks have told why.
    assert said_by("soc", here({}))[0][0] == said_by("soc", here(environ, {}))[0][0] == "ok"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch; torch.npu = type('N', (), dict(device_count=lambda: 1, get_device_name=str))", ["0"]),
        (NO_HCCL, "libhccl.so"),
        ("import os; os.abort()", None),
    ],
)
def test_torch_npu_is_asked_where_torch_loads_no_extension(code, said, tmp_path):
    site = package(tmp_path / "site", "torch_npu", code)
    facts = ask_torch(environment(site, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert facts.version is not None
    assert (facts.error is None) == (said is not None)
    assert said is None or facts.devices("npu") == said or said in facts.said["npu"]["error"]


NVIDIA = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: 12\n"


@pytest.mark.parametrize(
    ("driver", "said", "part"),
    [
        (None, {"torch": "2.13.0", "cuda_build": "13.0"}, "2 NVIDIA GPU(s) on the PCI bus, and no driver"),
        (
            NVIDIA,
            {"torch": "2.13.0+cpu", "cuda_build": None},
            "570.133.20 is here, and torch 2.13.0+cpu is built",
        ),
        (NVIDIA, {"torch": "2.13.0", "cuda_build": "13.0"}, "570.133.20 is older than 580.65, which CUDA 13.0 needs"),
        (NVIDIA, {"torch": "2.13.0", "cuda_build": "12.8"}, "torch sees no GPU (CUDA_VISIBLE_DEVICES=7)"),
        (NVIDIA, {"torch": "2", "cuda_build": "12.8", "cuda": {"error": "Xid 79"}}, "GPUs do not answer: Xid 79"),
        (NVIDIA, {"torch": "2", "cuda_build": "12.8", "cuda": {"devices": ["H100"]}, "nccl": "2.29"}, "1 x H100"),
    ],
)
def test_cuda(driver, said, part, here, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_torch, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor_pci, "DEVICES", tmp_path / "pci")
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300")]):
        (tmp_path / f"pci/{number}").mkdir(parents=True)
        (tmp_path / f"pci/{number}/vendor").write_text(f"{vendor}\n")
        (tmp_path / f"pci/{number}/class").write_text(f"{kind}\n")
    if driver:
        (tmp_path / "version").write_text(driver)
    found = said_by("cuda", here({"CUDA_VISIBLE_DEVICES": "7", "NCCL_BLOCKING_WAIT": "1"}, said))
    assert part in found[0][1]
    assert found[1] == ("warn", "NCCL_BLOCKING_WAIT is not read by this torch")


@pytest.mark.parametrize("arguments", [["--yaml"], ["a", "b"], ["key=value"]])
def test_other_arguments_are_refused(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert "octofold doctor --help" in capsys.readouterr().err


def test_every_problem_belongs_to_a_check_and_the_page_lists_it():
    modules = [importlib.import_module(f"octofold.launch.{path.stem}") for path in (ROOT / "launch").glob("doctor*.py")]
    known = {id(value) for module in modules for value in vars(module).values() if isinstance(value, Problem)}
    assert known == {id(problem) for check in CHECKS for problem in check.problems}
    page = (ROOT / "docs/doctor.md").read_text()
    assert doctor_page.table().strip() in page, "python tests/doctor_page.py prints what docs/doctor.md has to hold"
