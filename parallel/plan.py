"""What a model declares about itself, so that `apply` can split it without the model knowing its rank."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """Names of submodules, in forward order."""

    blocks: tuple[str, ...]
    """Gathered, computed and released one at a time."""
    experts: tuple[str, ...]
    """Modules whose parameters are stacked [E, …] by expert and may be split along E."""
