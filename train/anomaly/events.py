"""What was seen of a step whose modules were watched (train/anomaly/trace.py), as plain values. Torch-free."""

from dataclasses import dataclass, field

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Event:
    """One module's part in the forward pass of a micro-batch, or one node's in its backward pass."""

    module: str
    """Its name in the whole model; empty: what belongs to no other module."""
    direction: str
    operation: str
    """The class of the module or node."""
    micro: int
    stage: int
    """Of the pipeline; 0 without one."""
    given_is_finite: bool
    made_is_finite: bool
    given_bits: int
    made_bits: int


@dataclass(frozen=True)
class Sequences:
    """What passed between two blocks, or its gradient, by sequence of a micro-batch."""

    module: str
    """Whose output it is."""
    direction: str
    micro: int
    finite_B: list[bool]
    norm_B: list[float]


@dataclass
class Traced:
    """All of a step, in the order in which it happened on this rank."""

    events: list[Event] = field(default_factory=list)
    sequences: list[Sequences] = field(default_factory=list)
    loss_AB: list[list[float]] = field(default_factory=list)
    """Summed cross-entropy of each sequence; empty on ranks without the last layer."""
