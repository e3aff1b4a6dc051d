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
from octofold.train.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from octofold.train.checkpoint.storage import read_tensors, write_tensors
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
    if STEP_FOLDER.fullmatch(where.name) and where.is_dir() and not (where / "checkpoints").exists():
        return where
    folders = published(where)
    if not folders:
        raise UserError(f"{where} holds no checkpoint\n  remedy: name a run folder with checkpoints/step_N inside")
    return folders[max(folders)]


def _remove(folder: Path) -> None:
    """Remove a checkpoint if it is there; the manifest goes first, so that half a checkpoint never passes for one."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def publish_weights(run_dir: Path, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a checkpoint of weights only as step 0 of a run, from one process; all of it or nothing.

    Args:
        write: fills a folder with safetensors files of whole tensors named model.…; a weight may be E4M3 beside its
            scales (train/checkpoint/quantized.py).
        state: joins the manifest; `block` is the edge of the FP8 blocks.
    """
    final = run_dir / "checkpoints" / "step_0"
    partial = final.with_name(".step_0.partial")
    try:
        partial.mkdir(parents=True)
        write(partial)
        start = {"step": 0, "updates": 0, "tokens_seen": 0, "weights_only": True}
        write_manifest(partial, {**start, **state})
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


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
        self._on_first_rank(lambda: self._begin(partial), final)
        try:
            write_tensors(partial, tensors)
        except CheckpointException as error:
            self._on_first_rank(self._remove_partials, final)
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise self._unwritable(final, reasons) from None
        self._on_first_rank(lambda: self._publish(partial, final, state), final)
        self._on_first_rank(lambda: self._retire(step), final)
        return final

    def load(self, folder: Path, tensors: dict[str, torch.Tensor], *, whole: bool = True) -> dict[str, Any]:
        """Fill `tensors` from a checkpoint and return the state saved with them; `whole`: they must be all of it.

        One that holds weights only, as `publish_weights` writes, leaves the optimiser's moments as they are.

        Raises:
            UserError: the checkpoint is incomplete, or is of another model.
        """
        state = read_manifest(folder)
        if state.get("weights_only"):
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        read_tensors(folder, tensors, whole=whole, block=state.get("block"))
        return state

    def _begin(self, partial: Path) -> None:
        self._remove_partials()
        partial.mkdir(parents=True)

    def _remove_partials(self) -> None:
        """Free the room of what was never published."""
        for folder in (self.run_dir / "checkpoints").glob(".step_*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        try:
            write_manifest(partial, state)
        except OSError:
            self._remove_partials()
            raise
        _remove(final)
        partial.rename(final)

    def _retire(self, step: int) -> None:
        """Keep the newest, of which `step` is the last.

        Later steps belong to a course that was left when the run was resumed from an earlier checkpoint, and would be
        taken for the newest. They are set aside: nobody asked to delete them.
        """
        steps = published(self.run_dir)
        for later in [number for number in steps if number > step]:
            folder = steps.pop(later)
            aside = folder.with_name(f"{folder.name}.left_at_{step}")
            _remove(aside)
            folder.rename(aside)
        for folder in list(steps.values())[: -self.config.keep] if self.config.keep else []:
            _remove(folder)

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
