"""Which checkpoints of a run stay where they are: old ones go, and those of a course that was left are set aside.

Only the first rank does any of this.
"""

import time
from itertools import chain, count

from octofold.train.checkpoint.checksums import UnreadableError
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.manifest import MANIFEST
from octofold.train.checkpoint.retention import retired
from octofold.train.checkpoint.validity import step_folders, valid_checkpoints
from octofold.train.config import CheckpointConfig


class Keeper:
    """Removes and sets aside in one place."""

    def __init__(self, checkpoints: Folder, config: CheckpointConfig) -> None:
        self._checkpoints, self._config = checkpoints, config
        self.damaged: set[int] = set()
        """Steps that pass the cheap check, and turned out to be damaged when they were loaded."""

    def retire(self, step: int) -> None:
        """Remove what is no longer kept, where `step` is the newest of the course."""
        self.leave(step)
        self.damaged.discard(step)
        valid, skipped = valid_checkpoints(self._checkpoints)
        invalid = {s.step for s in skipped if not isinstance(s.error, UnreadableError)} | self.damaged & valid.keys()
        times = {number: manifest.saved_at_s for number, manifest in valid.items() if number not in invalid}
        old, broken = retired(self._config, times, invalid, time.time())
        for number in [*broken, *old]:
            self._checkpoints.withdraw(f"step_{number}", MANIFEST)

    def leave(self, step: int) -> None:
        """Set aside what is later than `step`, where the run stands.

        It belongs to a course that was left when the run was resumed from an earlier checkpoint, and would be taken
        for the newest. Nobody asked to delete it.
        """
        taken = set(self._checkpoints.folders())
        for later in [number for number in step_folders(self._checkpoints) if number > step]:
            aside = f"step_{later}.left_at_{step}"
            aside = next(name for name in chain([aside], (f"{aside}.{n}" for n in count(2))) if name not in taken)
            self._checkpoints.set_aside(f"step_{later}", aside, MANIFEST)
