"""Which layers each stage of a pipeline holds, on which rank it stands, and what each schedule asks. Torch-free.

A pipeline of p ranks with n stages each has p·n stages. Placed in a loop, stage s stands on rank s mod p; placed in a V
(n = 2), rank r holds stages r and 2p − 1 − r, so that the first and the last stage share a rank.
"""

from dataclasses import dataclass

from octofold.backends.errors import ConfigError, unknown_name_error
from octofold.parallel.config import ParallelConfig
from octofold.parallel.plan import Part


@dataclass(frozen=True)
class ScheduleKind:
    """What is fixed for a schedule of `parallel.pipeline_schedule`."""

    torch_name: str
    """Its class in torch.distributed.pipelining."""
    stages: int
    """Stages a rank, unless `parallel.pipeline_stages` says otherwise."""
    placement: str
    """loop or v."""
    most_stages: int
    """Stages a rank at most; 0: any number from `stages` on."""
    splits_backward: bool = False
    """It computes gradients of weights apart from, and later than, those of activations."""


SCHEDULES = {
    "gpipe": ScheduleKind("GPipe", 1, "loop", 1),
    "1f1b": ScheduleKind("1F1B", 1, "loop", 1),
    "interleaved": ScheduleKind("Interleaved1F1B", 2, "loop", 0),
    "zbv": ScheduleKind("ZBVZeroBubble", 2, "v", 2, splits_backward=True),
    "dualpipev": ScheduleKind("DualPipeV", 2, "v", 2, splits_backward=True),
}
"""GPipe (arXiv 1811.06965); 1F1B (PipeDream-flush, arXiv 2006.09503); interleaved 1F1B (arXiv 2104.04473); ZB-V (arXiv
2401.10241); DualPipeV (DeepSeek-V3, section 3.2.1, cut in half)."""


def stages_a_rank(config: ParallelConfig) -> int:
    """Stages that each pipeline rank holds."""
    return 1 if config.pipeline == 1 else config.pipeline_stages or SCHEDULES[config.pipeline_schedule].stages


def rank_of_stage(config: ParallelConfig) -> list[int]:
    """The pipeline rank of each stage, in the order of stages."""
    ranks, stages = config.pipeline, config.pipeline * stages_a_rank(config)
    if SCHEDULES[config.pipeline_schedule].placement == "v":
        return [*range(ranks), *reversed(range(ranks))][:stages]
    return [stage % ranks for stage in range(stages)]


def split_layers(config: ParallelConfig, layers: int, depths: int) -> list[Part]:
    """The part of each stage, in order.

    As `parallel.pipeline_split` says; else so that the fullest stage is as light as whole layers allow, where the first
    stage also carries `pipeline_embedding_layers` and the last `pipeline_head_layers` for the head, and as much and a
    layer more for each depth of multi-token prediction.

    Args:
        config: resolved, and checked by `check_pipeline`.
        layers: of the model, without multi-token prediction.
        depths: of multi-token prediction.
    """
    stages = config.pipeline * stages_a_rank(config)
    counts = list(config.pipeline_split) or [1] * stages
    if not config.pipeline_split:
        loads = [1.0] * stages
        loads[0] += config.pipeline_embedding_layers
        loads[-1] += config.pipeline_head_layers * (1 + depths) + depths
        for _ in range(layers - stages):
            lightest = loads.index(min(loads))
            loads[lightest] += 1.0
            counts[lightest] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [
        Part(range(end - count, end), first=stage == 0, last=stage == stages - 1)
        for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def check_pipeline(config: ParallelConfig, layers: int, micro_batches: int) -> None:
    """Refuse what a schedule cannot run.

    Args:
        config: with resolved degrees.
        layers: of the model, without multi-token prediction.
        micro_batches: that a rank accumulates in a step.

    Raises:
        ConfigError: naming the keys, the rule and the remedy.
    """
    if config.pipeline_schedule not in SCHEDULES:
        raise unknown_name_error("parallel.pipeline_schedule", config.pipeline_schedule, list(SCHEDULES))
    for name in ("pipeline_stages", "pipeline_embedding_layers", "pipeline_head_layers"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"parallel.{name}", getattr(config, name), "at least 0", f"parallel.{name}=0")
    if config.pipeline == 1:
        if config.pipeline_stages or config.pipeline_split:
            shown = f"parallel.pipeline_stages={config.pipeline_stages} pipeline_split={list(config.pipeline_split)}"
            rule = "without a pipeline (parallel.pipeline=1) there is one stage"
            raise ConfigError("parallel.pipeline", shown, rule, "parallel.pipeline above 1, or leave these out")
        return
    _check_stages(config, layers)
    _check_micro_batches(config, micro_batches)


def _check_stages(config: ParallelConfig, layers: int) -> None:
    kind, held = SCHEDULES[config.pipeline_schedule], stages_a_rank(config)
    shown = f"parallel.pipeline_schedule={config.pipeline_schedule} parallel.pipeline_stages={held}"
    if held < kind.stages or (kind.most_stages and held > kind.most_stages):
        number = f"exactly {kind.stages}" if kind.most_stages else f"at least {kind.stages}"
        rule = f"the schedule wants {number} stage(s) a rank"
        raise ConfigError("parallel.pipeline_stages", shown, rule, "parallel.pipeline_stages=0 takes what it wants")
    stages = config.pipeline * held
    shown = f"model.num_hidden_layers={layers} parallel.pipeline={config.pipeline} {shown}"
    if layers < stages:
        rule = f"each of {config.pipeline} x {held} = {stages} stages holds at least one layer"
        raise ConfigError("parallel.pipeline", shown, rule, "fewer ranks or stages, or a deeper model")
    split = list(config.pipeline_split)
    if split and (len(split) != stages or sum(split) != layers or min(split) < 1):
        rule = f"one number of layers, at least 1, for each of {stages} stages, {layers} in all"
        raise ConfigError("parallel.pipeline_split", split, rule, "parallel.pipeline_split=[] splits evenly")


def _check_micro_batches(config: ParallelConfig, micro_batches: int) -> None:
    name, ranks = config.pipeline_schedule, config.pipeline
    stages = ranks * stages_a_rank(config)
    least = {"1f1b": ranks, "interleaved": ranks, "dualpipev": stages}.get(name, 1)
    shown = f"parallel.pipeline_schedule={name} parallel.pipeline={ranks}, {micro_batches} micro-batch(es) a step"
    remedy = "micro-batches = train.global_batch_size / (train.micro_batch_size x data ranks); change one of these"
    if micro_batches < least:
        rule = f"{name} needs at least {least} micro-batches for {stages} stages"
        raise ConfigError("train.global_batch_size", shown, rule, remedy)
    if name == "interleaved" and micro_batches % (micro_batches // ranks):
        rule = f"interleaved takes them in {micro_batches // ranks} rounds of equal size"
        raise ConfigError("train.global_batch_size", shown, rule, f"{remedy}, best to a multiple of {ranks}")
