"""What a model declares about itself, so that `apply` can split it without the model knowing its rank."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """Names of submodules and parameters, in forward order. What is not named is whole on every rank."""

    blocks: tuple[str, ...]
    """Gathered, computed and released one at a time."""
    experts: tuple[str, ...]
    """Modules whose parameters are stacked [E, …] by expert and may be split along E."""
    columns: tuple[str, ...] = ()
    """Modules whose weight [out, in] tensor ranks split along out: each computes some of the outputs (heads, widths,
    the vocabulary)."""
    rows: tuple[str, ...] = ()
    """Modules whose weight [out, in] tensor ranks split along in: each computes a part of every output's sum."""
    sequences: tuple[str, ...] = ()
    """Modules with an attribute `sequence` (parallel/sequence.py), through which they see tokens of other ranks."""
    compiled: tuple[str, ...] = ()
    """Modules with a method `compute` of a tensor, without collectives or effects, that torch.compile may take."""


@dataclass(frozen=True)
class Part:
    """The part of a model that is one stage of a pipeline; stages follow one another without gaps."""

    layers: range
    """Numbers of its layers, those of multi-token prediction not counted: they belong to the last stage."""
    first: bool = True
    """It begins with the embedding."""
    last: bool = True
    """It ends with the final norm, the head and multi-token prediction."""
