"""Where the checkpoints of a run lie: step_N folders, published by renaming, the newest few kept."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from octofold.backends.collectives import all_reduce_sum
from octofold.backends.errors import UserError
from octofold.train.checkpoint.storage import MANIFEST, read_manifest, read_tensors, write_manifest, write_tensors
from octofold.train.config import CheckpointConfig

STEP_FOLDER = re.compile(r"step_(\d+)")


def published(run_dir: Path) -> dict[int, Path]:
    """Checkpoints of a run by step, oldest first. A folder still being written has another name and is not listed."""
    folders = {}
    for path in (run_dir / "checkpoints").glob("step_*"):
        if (match := STEP_FOLDER.fullmatch(path.name)) and (path / MANIFEST).exists():
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))


def find(where: Path) -> Path:
    """The checkpoint meant by a run folder (its newest) or by a step folder.

    Raises:
        UserError: there is none.
    """
    if STEP_FOLDER.fullmatch(where.name) and where.is_dir():
        return where
    folders = published(where)
    if not folders:
        raise UserError(f"{where} holds no checkpoint\n  remedy: name a run folder with checkpoints/step_N inside")
    return folders[max(folders)]


class Checkpointer:
    """Saves and loads one run's checkpoints. Every method is collective: all ranks call it together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, device: torch.device) -> None:
        self.run_dir, self.config, self.device = run_dir, config, device

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint aside, publish it by renaming, then remove those beyond `keep`.

        Raises:
            UserError: it could not be written; the earlier ones are untouched.
        """
        final = self.run_dir / "checkpoints" / f"step_{step}"
        partial = final.with_name(f".step_{step}.partial")
        self._on_first_rank(lambda: self._make_empty(partial), final)
        try:
            write_tensors(partial, tensors)
        except CheckpointException as error:
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise self._unwritable(final, reasons) from None
        self._on_first_rank(lambda: self._publish(partial, final, state), final)
        return final

    def load(self, folder: Path, tensors: dict[str, torch.Tensor], *, whole: bool = True) -> dict[str, Any]:
        """Fill `tensors` from a checkpoint and return the state saved with them; `whole`: they must be all of it.

        Raises:
            UserError: the checkpoint is incomplete, or is of another model.
        """
        state = read_manifest(folder)
        read_tensors(folder, tensors, whole=whole)
        return state

    @staticmethod
    def _make_empty(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        write_manifest(partial, state)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        steps = list(published(self.run_dir).items())
        for _, folder in steps[: -self.config.keep] if self.config.keep else []:
            shutil.rmtree(folder)

    def _on_first_rank(self, action: Callable[[], None], final: Path) -> None:
        """Run `action` on rank 0 and let every rank know whether it failed."""
        failure: OSError | None = None
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = error
        failed = all_reduce_sum(torch.tensor([float(failure is not None)], device=self.device))
        if failed.item():
            raise self._unwritable(final, str(failure) if failure else "rank 0 could not write it")

    @staticmethod
    def _unwritable(final: Path, reason: str) -> UserError:
        return UserError(
            f"checkpoint {final} could not be written: {reason}\n"
            "  remedy: free space or mend permissions, then resume; earlier checkpoints are untouched"
        )
