"""What a run does about an anomaly: goes on, goes back, or stops (`train.on_anomaly`). Collective."""

from typing import TYPE_CHECKING

from octofold.train.anomaly.account import Anomaly
from octofold.train.anomaly.judge import stop_error
from octofold.train.checkpoint.checksums import DamagedError
from octofold.train.checkpoint.folders import Folder

if TYPE_CHECKING:
    from octofold.train.trainer import Trainer

Samples = tuple[int, int]
"""The first global sample of a step's batch, and the one behind its last."""


def respond(trainer: "Trainer", anomaly: Anomaly, batch: Samples | None, note: str = "") -> None:
    """Tell of the anomaly, then do as the policy says.

    Args:
        batch: of the step, left out from now on if the run goes back and the batch may be to blame.
        note: ends the line on the console.

    Raises:
        UserError: the run stops here.
    """
    guard, policy, step = trainer.guard, trainer.config.train.on_anomaly, trainer.progress.step
    guard.bound.note(step, str(anomaly))
    record = anomaly.record(step, trainer.loader.origin)
    copies = anomaly.cause == "replicas"
    # Copies that differ stay so: there is nothing to skip.
    stops = policy == "stop" or guard.bound.exceeded or (copies and policy == "skip")
    blamed = batch if anomaly.cause.startswith("data") else None
    folder = _go_back(trainer, blamed) if policy == "rollback" and not stops else None
    if stops or (copies and folder is None):
        trainer.log({**record, "action": "stopped"})
        last = next(iter(trainer.checkpointer.trained(step)), None)
        raise stop_error(guard.bound, policy, last, trainer.engine.scaler.scale > 1)
    if folder is not None:
        record |= {"action": "rolled_back", "to_step": trainer.progress.step}
        done = f"back to {folder.name}"
        if blamed is not None:
            record["left_out"] = list(blamed)
            done += f", without samples {blamed[0]} to {blamed[1] - 1}"
    else:
        record["action"] = "skipped"
        done = "the update was skipped on every rank"
        done += ", for there is no checkpoint to go back to" if policy == "rollback" else ""
    trainer.log(record)
    trainer.console.warn(f"step {step}: {anomaly}; {done}{note}")


def _go_back(trainer: "Trainer", batch: Samples | None) -> Folder | None:
    """Load the newest valid checkpoint; None where there is none. What was left out, and what went wrong, is not
    forgotten with the steps that are.

    Raises:
        UserError: there are some, and all turn out to be damaged.
    """
    left_out, recent = list(trainer.loader.left_out), trainer.guard.bound.recent
    folders = trainer.checkpointer.trained(trainer.progress.step)
    for number, folder in enumerate(folders, start=1):
        try:
            trainer.load(folder)
        except DamagedError as error:
            if number == len(folders):
                raise  # the weights in memory are gone
            trainer.console.warn(f"{error}; the next older checkpoint is tried")
            continue
        trainer.guard.bound.recent = recent
        trainer.loader.leave_out([*left_out, *([] if batch is None else [batch])])
        if trainer.metrics is not None:
            trainer.metrics.rewind(trainer.progress.step)
        return folder
    return None
