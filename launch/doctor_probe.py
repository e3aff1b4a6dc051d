"""Asks torch about itself in a process of its own, with a time limit: a broken installation may die or hang there."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("doctor_torch_facts.py")
LIMIT_S = 60.0
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class TorchFacts:
    """What torch said."""

    said: dict[str, Any]
    """As doctor_torch_facts.py; empty where torch cannot be imported."""
    error: str | None = None
    """Why the import failed; with what `said` tells, torch alone can be imported, its extensions cannot."""

    @property
    def version(self) -> str | None:
        """Of the torch that was imported, such as 2.13.0+cpu."""
        return self.said.get("torch")

    def devices(self, kind: str) -> list[str]:
        """Names of the devices of kind cuda or npu."""
        return list(self.said.get(kind, {}).get("devices", []))


def ask_torch(environ: Mapping[str, str], limit_s: float = LIMIT_S) -> TorchFacts:
    """What torch says; asked again without its extensions where it does not come up with them."""
    said, error = _ask(environ, limit_s)
    if error:
        return TorchFacts(_ask({**environ, AUTOLOAD: "0"}, limit_s, "alone")[0], error)
    return TorchFacts(said, error)


def _ask(environ: Mapping[str, str], limit_s: float, *arguments: str) -> tuple[dict[str, Any], str | None]:
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, errors="replace", check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {}, f"it did not end within {limit_s:g} s"
    if done.returncode < 0:
        return {}, f"the process was ended by signal {-done.returncode}"
    if done.returncode:
        return {}, _cause(done.stderr) or f"exit status {done.returncode}"
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {}, f"it printed {done.stdout[-200:]!r}"
    return said, None


def _cause(stderr: str) -> str:
    """The first error of a traceback and the last, which a chain of exceptions may make two."""
    errors = [line.strip() for line in stderr.splitlines() if line[:1].isalpha() and "Error" in line.split(":")[0]]
    if not errors:
        return (stderr.strip().splitlines() or [""])[-1][:300]
    return " <- ".join(dict.fromkeys([errors[-1][:300], errors[0][:300]]))
