"""What `octofold doctor` finds, what may be wrong, and what a check may look at. Torch-free."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from octofold.launch.doctor_probe import TorchFacts

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What a check says of one thing."""

    status: str
    """ok; warn: a job may suffer; fail: it will not run, or not as asked."""
    what: str
    remedy: str = ""
    name: str = ""
    """Of the check."""


@dataclass(frozen=True)
class Problem:
    """Something that may be wrong."""

    status: str
    what: str
    """With {facts}."""
    remedy: str

    def found(self, **facts: object) -> Finding:
        """It is so, with these facts."""
        return Finding(self.status, self.what.format(**facts), self.remedy.format(**facts))


@dataclass(frozen=True)
class Surroundings:
    """What checks look at, besides the machine itself."""

    environ: Mapping[str, str]
    run_dir: Path
    """Where runs are to be written."""
    torch: TorchFacts
    ascend: bool
    """Something of Ascend is here: torch_npu, CANN, the driver or a device."""


@dataclass(frozen=True)
class Check:
    """One look at the machine or the job's environment."""

    name: str
    about: str
    run: Callable[[Surroundings], Iterator[Finding]]
    problems: tuple[Problem, ...]
    """All that it may find."""

    def findings(self, here: Surroundings) -> list[Finding]:
        """What it says here; that it could not look is a finding, too."""
        try:
            found = list(self.run(here))
        except (OSError, ValueError, LookupError) as error:
            found = [Finding(WARN, f"could not be checked: {error}", "look at it by hand")]
        return [replace(finding, name=self.name) for finding in found]


def ok(what: str) -> Finding:
    """Nothing is wrong."""
    return Finding(OK, what)
