"""Random state that needs no saving: what a step draws follows from the seed, the step and what the rank computes.

Octofold's models draw nothing while they train. A model or hook of the user's may (dropout): it draws the same when a
step is computed again, and when a run is resumed, whatever was drawn before.
"""

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, sample: int, *coordinates: int) -> None:
    """Seed the generators of torch (CPU and device), Python and NumPy for a step's forward and backward passes.

    Args:
        seed: of the run.
        step: the attempted update, from 1.
        sample: the first global sample of this rank, so that the order of ranks does not count.
        coordinates: where the rank stands among those that share the sample and compute other parts of it: position in
            the sequence, stage. Tensor ranks hold the same activations and must draw the same for them.
    """
    text = ":".join(map(str, (seed, step, sample, *coordinates)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
