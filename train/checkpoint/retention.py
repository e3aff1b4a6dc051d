"""Which checkpoints of a run are no longer kept. Only arithmetic, torch-free.

A checkpoint stays while any rule wants it: it is one of the newest, young, or a milestone. What is not valid is left
alone until two newer valid ones exist: until then it may be all that somebody has.
"""

from collections.abc import Collection, Mapping

from octofold.train.config import CheckpointConfig

NEWER_VALID = 2
"""How many must exist before a folder that is not valid is removed."""


def retired(
    config: CheckpointConfig, saved_at_s: Mapping[int, float], invalid: Collection[int], now_s: float
) -> tuple[list[int], list[int]]:
    """Steps to remove: of valid checkpoints, and of folders that are none; oldest first.

    Args:
        saved_at_s: of the valid ones by step, in seconds since 1970.
        invalid: steps whose folders are not valid.
    """
    if not config.keep:
        return [], []
    steps = sorted(saved_at_s)
    kept = set(steps[-config.keep :])
    if config.keep_hours:
        kept |= {step for step in steps if now_s - saved_at_s[step] <= config.keep_hours * 3600}
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    broken = [step for step in sorted(invalid) if sum(valid > step for valid in kept) >= NEWER_VALID]
    return [step for step in steps if step not in kept], broken
