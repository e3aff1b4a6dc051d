"""Learning rate as a pure function of the number of applied updates."""

import math

from octofold.train.config import OptimConfig


def learning_rate(optim: OptimConfig, update: int, total_updates: int) -> float:
    """The rate of update number `update` (from 0) of `total_updates`.

    All schedules rise linearly over `warmup_steps`. Then `constant` stays; `cosine` falls to lr · min_lr_ratio at the
    end (Loshchilov and Hutter 2017); `wsd` stays and falls linearly over the last `decay_share` of the updates.
    """
    if update < optim.warmup_steps:
        return optim.lr * (update + 1) / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "cosine":
        span = max(1, total_updates - optim.warmup_steps)
        progress = min(1.0, (update - optim.warmup_steps) / span)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if optim.schedule == "wsd":
        # Where warm-up reaches into the decay, the fall begins at its end: the rate never jumps.
        decay = max(1.0, min(optim.decay_share * total_updates, total_updates - optim.warmup_steps))
        progress = min(1.0, max(0.0, (update - (total_updates - decay)) / decay))
        return optim.lr + (floor - optim.lr) * progress
    assert optim.schedule == "constant", optim.schedule
    return optim.lr
