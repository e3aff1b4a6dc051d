"""The checkpoints of a run: saved beside training and published whole, loaded from the newest that is valid."""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from octofold.backends.collectives import Group
from octofold.backends.errors import ConfigError, UserError
from octofold.backends.host_group import host_group
from octofold.backends.observing import unobserved
from octofold.train.checkpoint.checksums import DamagedError, UnreadableError
from octofold.train.checkpoint.folders import Folder, LocalFolder
from octofold.train.checkpoint.keeping import Keeper
from octofold.train.checkpoint.manifest import Manifest
from octofold.train.checkpoint.storage import Ranks, read_tensors
from octofold.train.checkpoint.validity import (
    Skipped,
    candidates,
    checkpoints_of,
    nothing_valid,
)
from octofold.train.checkpoint.writing import CheckpointWriter, HostCopies, ShardPlanner, shard_of
from octofold.train.config import CheckpointConfig

TIMEOUT = timedelta(hours=12)
"""For ranks that have written to wait for those that still do."""
OTHERS_S = 3600.0
"""How much of that is no sign of a hang. A rank that hangs while it writes is found by its own watchdog."""
SIGN_S = 1.0

_saving: WeakKeyDictionary[Group, threading.Thread] = WeakKeyDictionary()
"""By group, the save under way: its calls and another's must not mix."""


@dataclass
class _Save:
    """A save under way, and how it ended."""

    step: int
    writer: CheckpointWriter
    copied: threading.Event = field(default_factory=threading.Event)
    """Whether the tensors may change."""
    published: Folder | None = None
    failure: str | None = None
    error: BaseException | None = None
    """What no rule provides for: another rank has died, or a mistake of ours."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    folder: Folder
    state: dict[str, Any]
    """What was saved beside tensors."""
    skipped: list[Skipped] = field(default_factory=list)
    """Newer ones that are not valid, newest first."""


def _is_in(folder: Folder, place: Folder) -> bool:
    """Whether a folder lies right in a place, by whatever path it was named."""
    if isinstance(folder, LocalFolder) and isinstance(place, LocalFolder):
        return folder.path.resolve().parent == place.path.resolve()
    return folder.parent == place


class Checkpointer:
    """Saves and loads one run's checkpoints. Every method is collective: all ranks call it together."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        device: torch.device,
        *,
        made_by: dict[str, Any] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            made_by: what each manifest says of the run (`Manifest.made_by`).
            warn: tells the user; called from other threads too.
            alive: called while a checkpoint is read or written; from other threads too.
        """
        self.run_dir, self.config, self.device = run_dir, config, device
        self.checkpoints = checkpoints_of(run_dir, config.dir)
        self.place: Path | str = config.dir or run_dir
        """Where the run's own are looked for; named in errors."""
        self.last: Folder | None = None
        """The newest that this run has published or loaded, so far as ranks know of it."""
        self.skipped: list[Skipped] = []
        """What the last `load` passed over."""
        self.failures = 0
        """Saves in a row that failed."""
        self._made_by, self.warn, self._alive = made_by or {}, warn, alive
        self._copies, self._keeper = HostCopies(), Keeper(self.checkpoints, config)
        self._save: _Save | None = None
        self._failed: _Save | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        *,
        until_update: Collection[str] = (),
        last: bool = False,
    ) -> None:
        """Copy `tensors` to host memory, and publish a checkpoint of them beside what comes next.

        Args:
            until_update: names of tensors that stay as they are until `let_go` has returned, such as parameters and
                moments until the next update. Where they lie in host memory, they are copied beside what comes next.
            last: no other save makes up for this one, so it is tried however many have failed.

        One is written at a time: while another is, this waits for it, and says so. One that fails is warned of, and
        leaves the earlier ones as they are; `checkpoint.max_failures` of them in a row are an error.

        Raises:
            UserError: too many have failed one after the other.
        """
        self._finish(wanted=step)
        if self.failures >= self.config.max_failures and not last:
            raise self._unwritable()
        group = self._group()
        if self.config.asynchronous:
            shards = self._copies.take(tensors, later=until_update)
        else:
            shards = {name: shard_of(tensor) for name, tensor in tensors.items()}
        planner = ShardPlanner(tensors, shards)
        writer = CheckpointWriter(self.checkpoints, f"step_{step}", state, self._made_by, self.warn, self._alive)
        self._save = save = _Save(step, writer)
        thread = threading.Thread(target=self._write, args=(save, planner, group), name=f"save {step}")
        thread.daemon = True
        _saving[group] = thread
        thread.start()
        if not self.config.asynchronous:
            self._finish()

    def let_go(self) -> None:
        """Return once the save under way needs the tensors no longer. Not collective."""
        if self._save is not None:
            self._save.copied.wait()

    def wait(self) -> Folder | None:
        """Return once all that was asked for is published: the newest, None if there is none.

        Raises:
            UserError: the last save failed.
        """
        self._finish()
        if self.failures:
            raise self._unwritable()
        return self.last

    def load(self, where: Path | str | Folder, tensors: dict[str, torch.Tensor], *, whole: bool = True) -> Loaded:
        """Fill `tensors` from the newest valid checkpoint of a place, each byte checked on the way.

        One that holds weights only, as `publish_weights` writes, leaves the optimiser's moments as they are.

        Args:
            where: a checkpoint, or what holds several (a run's folder, `checkpoint.dir`); then one that turns out to be
                damaged is passed over, and the next older one is loaded.
            whole: `tensors` must be all that the checkpoint holds.

        Raises:
            UserError: no checkpoint there is valid, or it is of another model.
        """
        self._finish()
        ranks = Ranks(self._group())
        # The first rank looks, so that all see the same even while somebody writes.
        found, incomplete = ranks.first(lambda: candidates(where))
        skipped = incomplete
        for folder, manifest in found:
            try:
                loaded = self._load(folder, manifest, tensors, ranks.group, whole=whole, skipped=skipped)
            except DamagedError as error:
                skipped = [*skipped, Skipped(folder, error)]
                self.warn(f"{skipped[-1]}; the next older checkpoint is tried")
                continue
            for passed in loaded.skipped:
                if passed in incomplete:
                    self.warn(f"{passed}; passed over")
            return loaded
        raise nothing_valid(where, skipped)

    def begin(self, step: int) -> None:
        """Training begins at `step`, which `load` has loaded, or at 0: nothing returns to a course that was left.

        Where a run continues from one of its own checkpoints, its later ones are set aside.

        Raises:
            UserError: they cannot be.
        """
        self._finish()

        def leave() -> None:
            if self.last is None or not _is_in(self.last, self.checkpoints):
                return
            try:
                self._keeper.leave(step)
            except (OSError, UnreadableError) as error:
                rule = f"checkpoints later than step {step} are set aside when a run continues from there: {error}"
                raise ConfigError("checkpoint.dir", str(self.checkpoints), rule, "mend permissions") from None

        with unobserved():
            Ranks(self._group()).first(leave)

    def trained(self, up_to: int) -> list[Folder]:
        """The run's valid checkpoints that training can go back to, newest first, none of a later step.

        By the cheap check: loading one tells whether every byte is right.
        """
        self._finish()

        def look() -> list[Folder]:
            found, _ = candidates(self.place)
            states = [(folder, manifest.state) for folder, manifest in found]
            return [folder for folder, state in states if not state.get("weights_only") and state["step"] <= up_to]

        return Ranks(self._group()).first(look)

    def close(self) -> None:
        """Let the save under way end, without a word of how. Not collective."""
        if self._save is not None and (thread := _saving.get(host_group(TIMEOUT))) is not None:
            thread.join()

    def _load(
        self,
        folder: Folder,
        manifest: Manifest,
        tensors: dict[str, torch.Tensor],
        group: Group | None,
        *,
        whole: bool,
        skipped: list[Skipped],
    ) -> Loaded:
        if manifest.state.get("weights_only"):
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        try:
            read_tensors(folder, tensors, whole=whole, manifest=manifest, group=group, alive=self._alive)
        except DamagedError as error:
            if _is_in(folder, self.checkpoints) and not isinstance(error, UnreadableError):
                self._keeper.damaged.add(Skipped(folder, error).step)
            raise
        self.last = folder
        step = manifest.state.get("step", -1)
        self.skipped = [s for s in skipped if s.step > step]
        return Loaded(folder, manifest.state, self.skipped)

    def _group(self) -> Group:
        group = host_group(TIMEOUT)
        if (thread := _saving.get(group)) is not None:
            thread.join()
        return group

    def _finish(self, wanted: int | None = None) -> None:
        """Wait for the save under way, and count how it ended; `wanted`: the step that waits to be saved."""
        save, self._save = self._save, None
        if save is None:
            return
        thread = _saving[host_group(TIMEOUT)]
        if wanted is not None and thread.is_alive():
            began_s = time.monotonic()
            self._wait_for(thread, save)
            waited_s = time.monotonic() - began_s
            if waited_s > 0.1:
                self.warn(f"step {wanted} waited {waited_s:.1f} s until the checkpoint of step {save.step} was written")
        self._wait_for(thread, save)
        if save.error is not None:
            raise save.error
        if save.published is not None:
            self.last, self.failures = save.published, 0
        else:
            self.failures += 1
            self._failed = save

    def _wait_for(self, thread: threading.Thread, save: _Save) -> None:
        """Until a save has ended. A rank whose part is done is not taken for one that hangs while others write."""
        patient_until_s = time.monotonic() + OTHERS_S
        while thread.is_alive():
            thread.join(SIGN_S)
            if not save.writer.writing and time.monotonic() < patient_until_s:
                self._alive()

    def _write(self, save: _Save, planner: ShardPlanner, group: Group) -> None:
        """Write, publish and retire, in a thread of its own."""
        final = self.checkpoints / f"step_{save.step}"
        try:
            try:
                self._copies.finish()
            finally:
                save.copied.set()
            with unobserved():
                dcp.save({}, storage_writer=save.writer, planner=planner, process_group=group)
            save.published = final
        except CheckpointException as error:
            causes = {rank: failure[0] for rank, failure in error.failures.items()}
            if mistakes := [cause for cause in causes.values() if not isinstance(cause, OSError)]:
                save.error = mistakes[0]
                return
            save.failure = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
        except BaseException as error:  # noqa: BLE001 - raised again where the training thread waits
            save.error = error
            return
        if torch.distributed.get_rank() != 0:
            return
        try:
            if save.published is not None:
                self._keeper.retire(save.step)
            else:
                self.warn(f"checkpoint {final} could not be written: {save.failure}; tried again at the next interval")
                self.checkpoints.partial(final.name).remove()
        except (OSError, UnreadableError) as error:
            self.warn(f"{self.checkpoints}: what is no longer needed could not be removed: {error}")

    def _unwritable(self) -> UserError:
        assert self._failed is not None
        return UserError(
            f"checkpoint {self.checkpoints}/step_{self._failed.step} could not be written: {self._failed.failure}\n"
            f"  rule:   a run goes on after a failed save, but not without its last one, nor after "
            f"checkpoint.max_failures={self.config.max_failures} in a row ({self.failures} now)\n"
            "  remedy: free space or mend permissions, then resume; earlier checkpoints are untouched"
        )
