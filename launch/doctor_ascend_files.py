"""Where CANN and the Ascend driver are, and their versions, from the files that their installers write. Torch-free."""

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path("/usr/local/Ascend")
HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Variables that CANN's set_env.sh sets."""
VERSION_FILES = (
    "*-linux/ascend_toolkit_install.info",
    "ascend_toolkit_install.info",
    "runtime/version.info",
    "version.cfg",
)
VERSION = re.compile(r"^(?:version|Version|toolkit_running_version)=\[?(?:[^:\]\n]*:)?([^\]\s]+)", re.MULTILINE)
DEVICES = Path("/dev")


def cann_home(environ: Mapping[str, str]) -> Path | None:
    """The CANN that the environment names."""
    return next((Path(environ[name]) for name in HOMES if environ.get(name)), None)


def unsourced_cann() -> Path | None:
    """A CANN in the usual place, whether or not the environment names it."""
    return next((home for home in (ROOT / "cann", ROOT / "ascend-toolkit/latest") if home.is_dir()), None)


def cann_version(home: Path) -> str | None:
    """Of the CANN there."""
    for pattern in VERSION_FILES:
        for path in sorted(home.glob(pattern)):
            if found := VERSION.search(path.read_text(encoding="utf-8", errors="replace")):
                return found[1]
    return None


def has_operators(home: Path) -> bool:
    """Whether compiled operators are installed beside the toolkit: a package of its own for each chip."""
    return any(any(home.glob(pattern)) for pattern in ("*-linux/ascend_ops_install.info", "opp/built-in/op_impl/*"))


def driver_file(environ: Mapping[str, str]) -> Path | None:
    """The driver's version.info: beside the CANN that the environment names, or in the usual place."""
    home = cann_home(environ)
    roots = [*(home.absolute().parents if home else ()), ROOT]
    return next((path for root in roots if (path := root / "driver/version.info").is_file()), None)


def driver_version(path: Path) -> str | None:
    """From the driver's version.info."""
    found = VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def device_files() -> list[Path]:
    """/dev/davinci0 and so on, the NPUs that this machine, or container, shows."""
    return sorted(path for path in DEVICES.glob("davinci*") if path.name[7:].isdigit())
