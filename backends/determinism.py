"""Deterministic algorithms on or off, without paying at the start of a run for a compiler that it does not use."""

import torch


def set_deterministic(on: bool, *, compiling: bool = False) -> None:
    """Have torch take deterministic algorithms and refuse operations that have none; or not.

    Both calls set the same switch. `use_deterministic_algorithms` tells the compiler too and imports it for that, which
    takes a second on every rank.

    Args:
        compiling: torch.compile will be used.
    """
    if compiling:
        torch.use_deterministic_algorithms(on)
    else:
        torch.set_deterministic_debug_mode("error" if on else "default")
