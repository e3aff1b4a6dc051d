"""The layouts that the parity suite proves, all in one place, and the runs that it proves them on."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from octofold.launch.compose import apply, compose, parse
from octofold.launch.config import JobConfig
from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline_split import SCHEDULES, stages_a_rank
from octofold.train.config import RunConfig, validate
from octofold.train.layout.twin import smallest_world, twin

SEQUENCES, TOKENS = 8, 32
"""Of the global batch; of a sequence."""


@dataclass(frozen=True)
class Case:
    """A layout, as the overrides of `parallel` that make it: "data_shard=2 expert=2"."""

    degrees: str
    micro: int = 0
    """Sequences of a micro-batch; 0: so many that a rank accumulates over two, or what fills a pipeline."""

    def __str__(self) -> str:
        return self.degrees.replace(" ", ",") or "one"


def _cases(*degrees: str) -> list[Case]:
    return [Case(text) for text in degrees]


DEFAULT = [
    *_cases("data_shard=2", "data_replicate=2", "expert=2", "tensor=2", "context=2", "pipeline=2"),
    *_cases("tensor=2 context=2 expert=2", "data_replicate=2 data_shard=2 expert=2"),
    *_cases("expert=4 expert_route=two_stage", "expert=4 placement_every=1", "expert=2 expert_tensor=2"),
    *_cases("data_shard=2 tensor=2 expert=2 recompute=full accumulate=reduced reshard_after_forward=false"),
]
"""What the default suite proves; the rest is slow."""
SINGLE = _cases("data_shard=4", "data_shard=8", "data_replicate=4", "expert=4", "expert=8", "expert_tensor=4")
SINGLE += _cases("tensor=4", "context=4")
SINGLE += _cases("pipeline=4", "pipeline=2 pipeline_schedule=gpipe", "pipeline=2 pipeline_schedule=interleaved")
SINGLE += _cases("data_shard=2 compile=true")
SINGLE += _cases("pipeline=2 pipeline_schedule=zbv", "pipeline=2 pipeline_schedule=dualpipev")
PAIRS = [
    *_cases("data_replicate=2 data_shard=2", "data_shard=4 expert=2", "data_replicate=2 expert=2"),
    *_cases("data_shard=2 tensor=2", "data_shard=2 context=2"),
    *_cases("data_replicate=2 tensor=2", "data_replicate=2 context=2"),
    *_cases("tensor=2 expert=2", "tensor=2 expert=4", "context=2 expert=2", "context=2 expert=4"),
    *_cases("tensor=2 context=2"),
    *_cases("expert_tensor=2 tensor=2", "expert_tensor=2 context=2"),
    *_cases("data_shard=4 expert_tensor=2", "data_replicate=2 expert_tensor=2", "pipeline=2 expert_tensor=2"),
    *_cases("pipeline=2 data_shard=2", "pipeline=2 data_replicate=2", "pipeline=2 expert=2"),
    *_cases("pipeline=2 context=2", "pipeline=2 tensor=2"),
]
"""Every two degrees together, smallest first."""
SEVERAL = [
    *_cases("data_shard=2 tensor=2 context=2", "data_shard=2 tensor=2 expert=2"),
    *_cases("data_shard=2 context=2 expert=4", "data_shard=4 tensor=2 expert=8"),
    *_cases("data_replicate=2 tensor=2 context=2 expert=2", "data_replicate=2 data_shard=2 tensor=2 expert=4"),
    *_cases("data_shard=2 tensor=2 context=2 expert=2", "data_shard=2 tensor=2 context=2 expert=8"),
    *_cases("pipeline=2 tensor=2 context=2", "pipeline=2 data_shard=2 tensor=2 expert=4"),
    *_cases("pipeline=2 context=2 tensor=2 expert=4", "pipeline=2 data_replicate=2 context=2 expert=2"),
    *_cases("pipeline=2 data_shard=2 expert=2 pipeline_schedule=interleaved recompute=selective"),
    *_cases("pipeline=2 data_shard=2 context=2 expert=4 pipeline_split=[1,3]"),
    *_cases("pipeline=2 data_shard=2 tensor=2 expert=4 pipeline_schedule=zbv"),
    *_cases("pipeline=2 context=2 expert=2 pipeline_schedule=dualpipev"),
    *_cases("data_shard=4 tensor=2 expert=8 expert_route=two_stage expert_overlap=false"),
    *_cases("data_shard=2 tensor=2 context=2 expert=2 expert_tensor=2 expert_route=two_stage"),
    *_cases("pipeline=2 data_shard=2 tensor=2 expert=2 expert_tensor=2"),
    *_cases("expert=2 expert_tensor=2 placement_every=1", "pipeline=2 expert=2 placement_every=1"),
]
"""Three to five together."""
SEVERAL += [
    Case(f"data_replicate=2 context=2 expert=2 recompute={kind} accumulate=reduced")
    for kind in ("swiglu", "selective", "full")
]
FULL = [*SINGLE, *PAIRS, *SEVERAL]
MODELS = ("v2", "v3")
"""Tiny DeepSeek-V2, and tiny DeepSeek-V3 with multi-token prediction."""


@cache
def _job(model: str) -> JobConfig:
    return compose([f"model=deepseek_{model}_tiny", f"data.sequence_length={TOKENS}", "precision=fp64"])


def run_of(model: str, case: Case, folder: Path, *texts: str) -> tuple[RunConfig, int]:
    """The validated run of a case on FP64, three steps of the same batches for every case, and how many ranks it has.

    Args:
        folder: gets the text that the run reads.
        texts: further overrides.
    """
    degrees = [f"parallel.{text}" for text in case.degrees.split()]
    job = apply(_job(model), parse([*degrees, *(t for t in texts if not t.startswith("train."))]))
    ranks = smallest_world(job.parallel)
    job = replace(job, parallel=replace(job.parallel, data_shard=_data_shard(job, ranks)))
    small = twin(job, folder, steps=3, precision=job.precision)
    train = replace(small.train, global_batch_size=SEQUENCES, micro_batch_size=case.micro or _micro(small.parallel))
    small = apply(replace(small, train=train), parse([t for t in texts if t.startswith("train.")]))
    return validate(small, ranks), ranks


def _data_shard(job: JobConfig, ranks: int) -> int:
    parallel = job.parallel
    return ranks // (parallel.pipeline * parallel.data_replicate * parallel.context * parallel.tensor)


def _micro(parallel: ParallelConfig) -> int:
    """Sequences of a micro-batch."""
    stages = parallel.pipeline * stages_a_rank(parallel)
    filled = stages if SCHEDULES[parallel.pipeline_schedule].splits_backward else parallel.pipeline
    return max(1, SEQUENCES // (parallel.data * max(2, filled)))
