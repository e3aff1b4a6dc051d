"""Degrees of parallelism as the user writes them, and the rules that bind them. Torch-free.

World = pipeline x data_replicate x data_shard x context x tensor, outermost first. Experts see the same ranks again:
data_shard x context x tensor = expert_data x expert x expert_tensor.
"""

from dataclasses import dataclass, field, replace
from math import prod

from octofold.backends.dotted import is_dotted
from octofold.backends.errors import ConfigError, check_finite, unknown_name_error


@dataclass(frozen=True)
class ParallelConfig:
    """The `parallel` group."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = -1
    """-1: whatever the other degrees leave of the world."""
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    expert_route: str = "auto"
    """How tokens reach experts of other ranks. flat: a copy for each of a token's experts; two_stage: once to each node
    that holds some of them, then fanned out inside it; deepep: DeepSeek's library, on CUDA; auto: two_stage where the
    experts' ranks stand on several nodes, else flat; or a class of your own, package.module:name
    (parallel/expert_routes.py)."""
    expert_overlap: bool = True
    """Shared experts compute while tokens travel to the routed ones. Changes no bit of the results."""
    expert_capacity: float = 0.0
    """Places of an expert for each rank's tokens, as a multiple of the mean; what finds none is dropped and counted
    (`dropped_tokens` in the metrics), and the host never waits for sizes. 0: no limit, nothing is dropped."""
    recompute: str = "none"
    """What the backward pass forms again instead of keeping it: none; swiglu (outputs of SwiGLU); selective (those, the
    norms and what attention expands from its latents); full (whole blocks: only their inputs are kept)."""
    reshard_after_forward: bool = True
    """Let go of a block's gathered weights after its forward pass, as ZeRO-3; false: keep all of them until the step is
    computed, as ZeRO-1 and 2 do, for one gathering a step."""
    accumulate: str = "unreduced"
    """What micro-batches are added up in: unreduced (whole gradients on every rank, one reduction a step) or reduced
    (shards: far less memory, a reduction a micro-batch)."""
    reduce_dtype: str = "master"
    """What gradients are summed over ranks in: master (that of the master weights, FP32) or bf16."""

    compile: bool = False
    """Compile the norms with torch.compile, which takes a minute at the start (parallel/compile.py); not on
    Ascend, where a norm is one operator."""
    placement_every: int = 0
    """Steps after which experts are packed anew onto the ranks of the expert axis, by their mean loads since the last
    time (parallel/placement.py); 0: every expert stays where its number puts it."""

    pipeline_schedule: str = "1f1b"
    """Of forward and backward passes over micro-batches: gpipe, 1f1b, interleaved, zbv (zero bubble), dualpipev."""
    pipeline_stages: int = 0
    """Stages that each pipeline rank holds; 0: what the schedule wants (2 for interleaved, zbv, dualpipev, else 1)."""
    pipeline_split: list[int] = field(default_factory=list)
    """Layers of each stage, from the first to the last; empty: split evenly, counting what stands at the ends."""
    pipeline_embedding_layers: float = 0.0
    """As how many layers the embedding counts in an even split."""
    pipeline_head_layers: float = 1.0
    """As how many layers the head counts in an even split; each depth of multi-token prediction counts as much again,
    and a layer."""

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.data_replicate * self.data_shard

    @property
    def expert_data(self) -> int:
        """Ranks that hold shards of the same expert."""
        return self.data_shard * self.context * self.tensor // (self.expert * self.expert_tensor)


DENSE_DEGREES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
CHOICES = {
    "recompute": ["none", "swiglu", "selective", "full"],
    "accumulate": ["unreduced", "reduced"],
    "reduce_dtype": ["master", "bf16"],
}


EXPERT_ROUTES = ("auto", "flat", "two_stage", "deepep")
DEEPEP_TILE = 128
"""Numbers of a row that share a scale in DeepEP's FP8."""


def check_expert_route(config: ParallelConfig) -> None:
    """Raise `ConfigError` for a route to experts that does not exist, or choices that exclude each other."""
    check_finite("parallel.expert_capacity", config.expert_capacity, least=0.0)
    route = config.expert_route
    if route not in EXPERT_ROUTES and not is_dotted(route):
        raise unknown_name_error("parallel.expert_route", route, list(EXPERT_ROUTES))
    if config.expert_capacity and route not in ("auto", "flat"):
        shown = f"parallel.expert_capacity={config.expert_capacity} parallel.expert_route={route}"
        rule = "a fixed number of places for each rank's tokens is a way of the flat route"
        raise ConfigError("parallel.expert_capacity", shown, rule, "parallel.expert_route=flat, or expert_capacity=0")
    if route == "deepep" and config.expert_tensor > 1:
        shown = f"parallel.expert_route=deepep parallel.expert_tensor={config.expert_tensor}"
        rule = "DeepEP brings rows to ranks that hold whole experts"
        raise ConfigError("parallel.expert_route", shown, rule, "parallel.expert_tensor=1, or another route")


def resolve(config: ParallelConfig, world_size: int) -> ParallelConfig:
    """The degrees with `data_shard` inferred, checked against the number of ranks.

    Raises:
        ConfigError: an unknown choice, a degree below 1, degrees that do not
            multiply to `world_size`, or an expert degree that does not divide the ranks experts span.
    """
    _check_choices(config)
    for name in (*DENSE_DEGREES, "expert", "expert_tensor"):
        degree = getattr(config, name)
        if degree < 1 and not (name == "data_shard" and degree == -1):
            raise ConfigError(f"parallel.{name}", degree, "a degree is at least 1", f"parallel.{name}=1")
    check_expert_route(config)
    others = prod(getattr(config, name) for name in DENSE_DEGREES if name != "data_shard")
    if config.data_shard == -1:
        config = replace(config, data_shard=max(1, world_size // others))
    product = others * config.data_shard
    if product != world_size:
        shown = " ".join(f"parallel.{name}={getattr(config, name)}" for name in DENSE_DEGREES)
        rule = f"{' x '.join(DENSE_DEGREES)} = {product}, but the job has {world_size} rank(s)"
        raise ConfigError("parallel", shown, rule, "start as many ranks as the product, or set parallel.data_shard=-1")
    span = config.data_shard * config.context * config.tensor
    if span % (config.expert * config.expert_tensor):
        shown = (
            f"parallel.expert={config.expert} parallel.expert_tensor={config.expert_tensor} "
            f"parallel.data_shard={config.data_shard} parallel.context={config.context} parallel.tensor={config.tensor}"
        )
        rule = f"expert x expert_tensor must divide data_shard x context x tensor = {span} rank(s)"
        legal = [d for d in range(1, span + 1) if span % d == 0]
        raise ConfigError("parallel.expert", shown, rule, f"parallel.expert one of {legal}, or start more ranks")
    return config


def _check_choices(config: ParallelConfig) -> None:
    for name, legal in CHOICES.items():
        if getattr(config, name) not in legal:
            raise unknown_name_error(f"parallel.{name}", getattr(config, name), legal)
    if config.compile and config.recompute == "selective":
        shown = "parallel.compile=true parallel.recompute=selective"
        rule = "what is formed again must be what was compiled, bit for bit, and selective recompute forms it without"
        raise ConfigError("parallel.compile", shown, rule, "parallel.compile=false, or recompute=swiglu or full")
    every = config.placement_every
    if every < 0:
        raise ConfigError("parallel.placement_every", every, "must be at least 0", "parallel.placement_every=0")
    if every and config.expert == 1:
        shown = f"parallel.placement_every={every} parallel.expert=1"
        rule = "experts that all stand on one rank have nowhere to go"
        raise ConfigError("parallel.placement_every", shown, rule, "parallel.expert=2 or more, or placement_every=0")
    if config.pipeline > 1 and config.accumulate == "reduced":
        shown = f"parallel.accumulate=reduced parallel.pipeline={config.pipeline}"
        rule = "a pipeline's schedule reduces gradients once, after the last micro-batch"
        raise ConfigError("parallel.accumulate", shown, rule, "parallel.accumulate=unreduced, or pipeline=1")
