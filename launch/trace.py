"""`octofold trace`: what a job's step would hold in memory and send over which links, without the job or its machines.

Torch-free until the configuration is proved.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from octofold.backends.errors import ConfigError
from octofold.launch.config import JobConfig
from octofold.launch.job import draft
from octofold.launch.software_npu import enter_if_asked
from octofold.train.config import validate

if TYPE_CHECKING:
    from octofold.train.trace.run import Trace

DEVICES = {"ascend": "npu", "cpu": "cpu"}
"""By backend. A CUDA build of torch wants a driver for its streams."""


@dataclass(frozen=True)
class TraceConfig:
    """The `trace` keys."""

    ranks: int = 8
    """Of the job that is traced."""
    rank: int = 0
    """Whose step it is."""
    json: bool = False
    """For programs."""


@dataclass(frozen=True)
class TraceJob:
    """The root of the `trace` keys, so that they are written trace.ranks=2048."""

    trace: TraceConfig = field(default_factory=TraceConfig)


def run(argv: Sequence[str]) -> int:
    """Trace what the overrides describe and print it; returns 0.

    Raises:
        UserError: a configuration that cannot be trained, or whose step cannot be traced.
    """
    from octofold.launch.compose import apply, parse

    is_ours = [override.key_or_group.split(".")[0] == "trace" for override in parse(argv)]
    settings = apply(TraceJob(), parse([text for text, ours in zip(argv, is_ours, strict=True) if ours])).trace
    check(settings)
    config = validate(draft([text for text, ours in zip(argv, is_ours, strict=True) if not ours]), settings.ranks)
    assert isinstance(config, JobConfig)
    config = replace(config, backend=replace(config.backend, name=_backend(config)))
    _require_traceable(config)
    enter_if_asked(config.backend)
    _load_device(config)
    from octofold.train.trace.run import trace

    device_type = DEVICES[config.backend.name]
    traced = trace(config, rank=settings.rank, ranks=settings.ranks, device_type=device_type)
    if settings.json:
        print(json.dumps(asdict(traced)))
    else:
        _tell(config, settings, traced)
    return 0


def check(settings: TraceConfig) -> None:
    """Raise `ConfigError` for a job that has no such rank."""
    if settings.ranks < 1:
        raise ConfigError("trace.ranks", settings.ranks, "at least one rank", "trace.ranks=8")
    if not 0 <= settings.rank < settings.ranks:
        shown = f"trace.rank={settings.rank} trace.ranks={settings.ranks}"
        raise ConfigError("trace.rank", shown, "ranks are numbered from 0", f"trace.rank={settings.ranks - 1} or less")


def _backend(config: JobConfig) -> str:
    # What `auto` would find here says nothing of the job's machines.
    return "cpu" if config.backend.name == "auto" else config.backend.name


def _require_traceable(config: JobConfig) -> None:
    if config.backend.name not in DEVICES:
        rule = f"a trace is made for one of: {', '.join(DEVICES)}"
        raise ConfigError("backend.name", config.backend.name, rule, "backend=cpu traces the layout, with CPU kernels")
    if config.parallel.pipeline > 1:
        shown = f"trace parallel.pipeline={config.parallel.pipeline}"
        rule = "stages tell one another the shapes of what they send, and in a trace there is nobody to tell"
        raise ConfigError("parallel.pipeline", shown, rule, "parallel.pipeline=1")
    if config.parallel.expert_route == "deepep":
        rule = "DeepEP's kernels run on CUDA alone"
        raise ConfigError("parallel.expert_route", "deepep", rule, "parallel.expert_route=two_stage")
    if not config.model.vocab_size:
        rule = "a trace reads no data, so that the tokenizer does not tell the vocabulary's size"
        raise ConfigError("model.vocab_size", 0, rule, "model.vocab_size=129280")


def _load_device(config: JobConfig) -> None:
    """What makes torch know the device, present here or not."""
    if config.backend.name != "ascend":
        return
    from octofold.backends.registry import resolve

    resolve("ascend")


def _tell(config: JobConfig, settings: TraceConfig, traced: "Trace") -> None:
    from rich.console import Console
    from rich.table import Table

    from octofold.backends.topology import LINKS
    from octofold.train.memory import readable

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    count = traced.count
    console.print(
        f"rank {traced.rank} of {settings.ranks}, model {config.model.name}: {count.total:,} parameters, "
        f"{count.active:,} active, {count.mtp:,} for multi-token prediction"
    )
    console.print(f"tokens choose experts at random; traced in {traced.seconds:.0f} s\n")
    held = Table("held by this rank", box=None, pad_edge=False)
    held.add_column("", justify="right")
    for name in ("weights", "gradients", "moments"):
        held.add_row(name, readable(getattr(traced, f"{name}_bytes")))
    held.add_row(f"at most, in {traced.peak_phase}", readable(traced.peak_bytes))
    console.print(held)
    console.print()
    sent = Table("sent in a step", box=None, pad_edge=False)
    links = [link for link in LINKS if any(link in cost.sent_bytes for cost in traced.costs.values())]
    for title in ("calls", *links):
        sent.add_column(title, justify="right")
    for name, cost in sorted(traced.costs.items()):
        sizes = [readable(cost.sent_bytes[link]) if link in cost.sent_bytes else "" for link in links]
        sent.add_row(name, str(cost.calls), *sizes)
    console.print(sent)
    console.print("\nkernels: " + ", ".join(f"{op} {provider}" for op, provider in traced.kernels.items()))
