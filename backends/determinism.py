"""Deterministic algorithms on or off, without paying at the start of a run for a compiler that it does not use."""

import torch

from octofold.backends.base import Backend


def set_deterministic(on: bool, backend: Backend, *, compiling: bool = False) -> None:
    """Have torch take deterministic algorithms and refuse operations that have none; or not. Before groups are made.

    Where that alone does not make a backend deterministic, the user's own settings stand.

    Both calls set the same switch. `use_deterministic_algorithms` tells the compiler too and imports it for that, which
    takes a second on every rank.

    Args:
        compiling: torch.compile will be used.
    """
    on = on and backend.deterministic
    if compiling:
        torch.use_deterministic_algorithms(on)
    else:
        torch.set_deterministic_debug_mode("error" if on else "default")
