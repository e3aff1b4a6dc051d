"""Which code this is: the package's version, and the commit where it runs from a checkout. Torch-free."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def code_version() -> str:
    """Such as `0.1.0 (4f2c1aa-dirty)`, or `0.1.0` where the code was installed."""
    try:
        released = version("octofold")
    except PackageNotFoundError:
        released = "unknown"
    commit = _commit(Path(__file__).resolve().parent.parent)
    return f"{released} ({commit})" if commit else released


def _commit(root: Path) -> str:
    # Elsewhere a folder above may be a repository of something else.
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
