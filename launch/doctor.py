"""`octofold doctor`: checks this machine and the job's environment, and says what is wrong and the remedy.

It works where what it diagnoses is broken: nothing here imports torch, which is asked in a process of its own.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.launch import doctor_ascend, doctor_job, doctor_machine, doctor_network, doctor_torch
from octofold.launch.doctor_ascend_files import cann_home, device_files, driver_file, unsourced_cann
from octofold.launch.doctor_finding import FAIL, OK, WARN, Finding, Surroundings
from octofold.launch.doctor_pci import HUAWEI_VENDOR, NPU_CLASSES, pci_devices
from octofold.launch.doctor_probe import ask_torch

CHECKS = (
    *doctor_torch.CHECKS,
    *doctor_ascend.CHECKS,
    *doctor_job.CHECKS,
    *doctor_network.CHECKS,
    *doctor_machine.CHECKS,
)
"""In the order of the output."""


def diagnose(environ: Mapping[str, str], run_dir: Path) -> list[Finding]:
    """What every check says of this machine and this environment.

    Args:
        run_dir: where runs are to be written; need not exist.
    """
    installed = (doctor_torch.installed("torch-npu"), cann_home(environ), unsourced_cann(), driver_file(environ))
    devices = device_files() or pci_devices(HUAWEI_VENDOR, NPU_CLASSES)
    here = Surroundings(environ, run_dir, ask_torch(environ), ascend=any(installed) or bool(devices))
    return [finding for check in CHECKS for finding in check.findings(here)]


def run(argv: list[str]) -> int:
    """Print what is found; 0 where nothing fails, else 1.

    Args:
        argv: a folder where runs are to be written, and --json.

    Raises:
        UserError: other arguments.
    """
    folders = [text for text in argv if text != "--json"]
    if len(folders) > 1 or any(text.startswith("-") or "=" in text for text in folders):
        rule = "it takes a folder where runs are to be written, and --json"
        raise UserError(f"doctor {' '.join(argv)}\n  rule:   {rule}\n  remedy: octofold doctor --help")
    found = diagnose(os.environ, Path(folders[0] if folders else "runs").expanduser())
    failed = sum(finding.status == FAIL for finding in found)
    if "--json" in argv:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            print(f"{finding.status:4}  {finding.name:{width}}  {finding.what}")
            if finding.remedy:
                print(f"{'':{width + 6}}  remedy: {finding.remedy}")
        counts = {status: sum(finding.status == status for finding in found) for status in (FAIL, WARN, OK)}
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if failed else 0
