"""Which checkpoints are there, and which of them may be loaded. Torch-free.

Two checks: the cheap one reads the manifest and compares sizes, the full one compares the checksum of every block.
A folder that fails is told with its reason, and never loaded.
"""

from dataclasses import dataclass, field
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.train.checkpoint.checksums import CheckedFile, DamagedError, UnreadableError, unreadable
from octofold.train.checkpoint.folders import Folder, folder_at
from octofold.train.checkpoint.manifest import STEP_FOLDER, Manifest, read_manifest
from octofold.train.checkpoint.patience import patiently

CHECKPOINTS = "checkpoints"
"""The folder of a run in which they lie, where `checkpoint.dir` says nothing else."""


@dataclass(frozen=True)
class Skipped:
    """A folder that looks like a checkpoint and is none."""

    path: Folder
    error: DamagedError

    @property
    def step(self) -> int:
        """That its name tells of; -1 where it tells of none."""
        match = STEP_FOLDER.fullmatch(self.path.name)
        return int(match[1]) if match else -1

    def __str__(self) -> str:
        return str(self.error).splitlines()[0]


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, and what was passed over on the way to it."""

    path: Folder
    manifest: Manifest
    skipped: list[Skipped] = field(default_factory=list)
    """Newer than `path`, newest first."""


def checkpoints_of(run_dir: Path | str | Folder, directory: str | None = None) -> Folder:
    """The folder with a run's checkpoints.

    Args:
        directory: the run's `checkpoint.dir`.
    """
    return folder_at(directory) if directory else folder_at(run_dir) / CHECKPOINTS


def step_folders(checkpoints: Folder) -> dict[int, Folder]:
    """Every folder named as a checkpoint, valid or not, by step, oldest first.

    Raises:
        UnreadableError: the disk or the store does not list them.
    """
    try:
        names = patiently(checkpoints.folders)
    except OSError as error:
        raise UnreadableError(unreadable(checkpoints, error)) from None
    steps = {int(match[1]): name for name in names if (match := STEP_FOLDER.fullmatch(name))}
    return {step: checkpoints / steps[step] for step in sorted(steps)}


def valid_checkpoints(checkpoints: Folder) -> tuple[dict[int, Manifest], list[Skipped]]:
    """By the cheap check: manifests of valid ones by step, oldest first; and the others, newest first."""
    valid: dict[int, Manifest] = {}
    skipped: list[Skipped] = []
    for step, folder in step_folders(checkpoints).items():
        try:
            valid[step] = read_manifest(folder)
        except DamagedError as error:
            skipped.insert(0, Skipped(folder, error))
    return valid, skipped


def candidates(where: Path | str | Folder) -> tuple[list[tuple[Folder, Manifest]], list[Skipped]]:
    """What may be loaded of a place, newest first, and what may not, newest first, by the cheap check.

    Args:
        where: a checkpoint, a folder of checkpoints (as `checkpoint.dir` names one), or a run's folder.
    """
    folder = folder_at(where)
    if is_checkpoint(folder):
        try:
            return [(folder, read_manifest(folder))], []
        except DamagedError as error:
            return [], [Skipped(folder, error)]
    inner = folder / CHECKPOINTS
    holder = inner if step_folders(inner) or not step_folders(folder) else folder
    valid, skipped = valid_checkpoints(holder)
    return [(holder / f"step_{step}", valid[step]) for step in reversed(valid)], skipped


def is_checkpoint(folder: Folder) -> bool:
    """Whether a path means one checkpoint, not a place that holds several."""
    return STEP_FOLDER.fullmatch(folder.name) is not None and not (folder / CHECKPOINTS).folders()


def find_valid(where: Path | str | Folder) -> Found:
    """The newest valid checkpoint of a place, by the cheap check; see `candidates`.

    Raises:
        UserError: there is none; says why each that looks like one is not.
    """
    valid, skipped = candidates(where)
    if not valid:
        raise nothing_valid(where, skipped)
    path, manifest = valid[0]
    newest = manifest.state.get("step", -1)
    return Found(path, manifest, [s for s in skipped if s.step > newest])


def nothing_valid(where: Path | str | Folder, skipped: list[Skipped]) -> UserError:
    """What it means to the user that a place holds no checkpoint that may be loaded."""
    if len(skipped) == 1 and folder_at(where) == skipped[0].path:
        return skipped[0].error
    if skipped:
        told = "\n  ".join(str(s) for s in skipped)
        if any(isinstance(s.error, UnreadableError) for s in skipped):
            remedy = "start again once they can be read; nothing was removed"
            return UnreadableError(f"{where} holds no checkpoint that can be read now\n  {told}\n  remedy: {remedy}")
        return DamagedError(
            f"{where} holds no valid checkpoint\n  {told}\n  remedy: start the run over in another folder"
        )
    return UserError(f"{where} holds no checkpoint\n  remedy: name a run folder with {CHECKPOINTS}/step_N inside")


def check_in_full(folder: Folder, manifest: Manifest | None = None) -> Manifest:
    """Compare every byte of a checkpoint with its checksums, in this process alone; returns the manifest.

    Raises:
        DamagedError: a file is not what was written (says which).
    """
    manifest = manifest or read_manifest(folder)
    for name, record in manifest.files.items():
        with CheckedFile(folder, name, record) as file:
            for number in range(record.count):
                file.check(number)
    return manifest
