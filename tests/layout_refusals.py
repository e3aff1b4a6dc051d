"""Layouts that are refused: an example of every rule, and where in the code the rules are.

A rule is a place that raises a `ConfigError` about a layout. `rules` finds them in the source, `broken_rule` tells
which one an example met: so no rule can be added without an example.
"""

import ast
from functools import cache
from pathlib import Path

import torch

from octofold.backends.errors import ConfigError
from octofold.backends.topology import Topology
from octofold.launch.compose import apply, compose, parse
from octofold.launch.config import JobConfig
from octofold.launch.verify import run as verify
from octofold.train.build import draft_model
from octofold.train.config import validate
from octofold.train.layout.twin import smallest_world

ROOT = Path(__file__).parents[1]
FOLDERS = ("backends", "kernels", "parallel", "train", "launch")
REFUSED = [
    "parallel.tensor=0",
    "parallel.data_shard=3 launch.nproc_per_node=4",
    "parallel.expert=3 launch.nproc_per_node=4",
    "parallel.expert=3 train.global_batch_size=6",
    "parallel.tensor=8",
    "parallel.tensor=4 model.intermediate_size=190",
    "parallel.tensor=4 model.moe_intermediate_size=33",
    "parallel.tensor=4 model.vocab_size=321",
    "parallel.tensor=3 model.num_attention_heads=6 model.moe_intermediate_size=48 model.vocab_size=0",
    "parallel.expert=2 parallel.expert_tensor=5 model.moe_intermediate_size=32 train.global_batch_size=10",
    "parallel.data_shard=4 backend.ranks_per_node=3",
    "parallel.data_shard=4 backend.ranks_per_supernode=4",
    "parallel.data_shard=4 backend.all_reduce=ring",
    "parallel.context=2 data.sequence_length=30",
    "parallel.data_shard=3 train.global_batch_size=8",
    "parallel.expert=2 parallel.expert_route=rings",
    "parallel.expert=2 parallel.expert_route=two_stage parallel.expert_capacity=1.25",
    "parallel.expert=2 parallel.expert_tensor=2 parallel.expert_route=deepep",
    "parallel.expert=2 parallel.expert_route=deepep precision=fp64",
    "parallel.expert=2 parallel.expert_route=deepep precision=fp8_block precision.block=64",
    "parallel.expert=2 parallel.expert_capacity=-1",
    "parallel.recompute=some",
    "parallel.compile=true parallel.recompute=selective",
    "parallel.expert=2 parallel.placement_every=-1",
    "parallel.data_shard=2 parallel.placement_every=100",
    "parallel.data_shard=2 parallel.reduce_dtype=bf16",
    "parallel.data_shard=2 parallel.reduce_dtype=bf16 precision=fp64",
    "parallel.pipeline=8",
    "parallel.pipeline=2 parallel.pipeline_schedule=wave",
    "parallel.pipeline=2 parallel.pipeline_stages=2",
    "parallel.pipeline=2 parallel.pipeline_split=[1,1]",
    "parallel.pipeline_split=[1,3]",
    "parallel.pipeline=2 parallel.pipeline_schedule=dualpipev train.global_batch_size=2",
    "parallel.pipeline=2 parallel.pipeline_head_layers=-1",
    "parallel.pipeline=2 train.global_batch_size=1",
    "parallel.pipeline=2 parallel.pipeline_schedule=interleaved train.global_batch_size=5",
    "parallel.pipeline=2 parallel.accumulate=reduced",
    "parallel.tensor=2 precision=fp8_block",
    "parallel.tensor=2 precision=fp8_tensor_current",
]
"""Overrides of the tiny DeepSeek-V3, each of which breaks a rule of its own or the same one in another way."""
VERIFY_REFUSED = [
    "verify layout parallel.data_shard=1",
    "verify layout parallel.expert=2 resume=auto",
    "verify layout parallel.expert=2 parallel.expert_route=deepep precision=bf16",
    "verify layout parallel.expert=2 parallel.expert_capacity=1.5",
    "verify layout parallel.expert=2 verify.precision=fp8",
    "verify layout parallel.expert=2 verify.precision=fp16",
    "verify layout parallel.expert=2 verify.ranks=1",
    "verify layout parallel.data_shard=3 parallel.tensor=4 parallel.expert=2 train.global_batch_size=6",
    "verify layout parallel.pipeline=2 parallel.tensor=2 parallel.context=2 parallel.data_replicate=2",
    "verify resume parallel.expert=2 resume=auto",
    "verify resume parallel.expert=2 parallel.expert_route=deepep precision=bf16",
    "verify resume parallel.expert=2 verify.resume_parallel={expert:2}",
]
ON_RANKS = {
    "parallel/apply.py:_distributed": "a dimension of your own `model.architecture` that ranks do not divide",
    "parallel/compile.py:apply_compile": "`parallel.compile=true` on Ascend, or without a C++ compiler",
    "parallel/expert_routes.py:build_route": "a route of your own that is none, or one that cannot serve here",
    "backends/topology.py:_check_environment": "a launcher whose nodes differ in size, or are not numbered one by one",
    "backends/topology.py:_check_table": "an Ascend rank table of another job or other nodes than the launcher's",
    "backends/hierarchical.py:__init__": "`backend.all_reduce=hierarchical` where one node has more ranks than another",
}
"""Functions whose rules need the device, its libraries or the user's classes; tests of theirs provoke them."""
WHOLE = ("parallel", "train/layout", "launch/verify_layout.py", "backends/hierarchical.py")
"""Every `ConfigError` here is about layouts; elsewhere those of functions that name a key of these groups are."""
KEYS = ("parallel.", "verify.ranks", "ranks_per_")
ELSEWHERE = {
    "train/memory.py:require_memory": "it names a remedy in parallel, and refuses a model",
    "launch/trace.py:_require_traceable": "it refuses a trace of a layout that trains (tests/test_train_trace.py)",
}


@cache
def _composed(*groups: str) -> JobConfig:
    return compose(["model=deepseek_v3_tiny", "train.micro_batch_size=1", *groups])


@cache
def refusal(text: str) -> ConfigError | None:
    """What a user is told of these overrides, on the smallest world where they name none."""
    texts = text.split()
    try:
        if texts[0] == "verify":
            verify([*texts[1:], "model=deepseek_v3_tiny", "train.micro_batch_size=1"])
            return None
        job = _composed(*(t for t in texts if "." not in t.split("=")[0]))
        job = apply(job, parse([t for t in texts if "." in t.split("=")[0]]))
        ranks = job.launch.nproc_per_node if job.launch.nproc_per_node > 1 else max(1, smallest_world(job.parallel))
        checked = validate(job, ranks)
        if checked.precision.is_fp8:
            draft_model(checked, torch.device("cpu"), 320, topology=Topology(ranks, ranks))
    except ConfigError as error:
        return error
    return None


def broken_rule(error: ConfigError) -> str | None:
    """The rule that raised it, as `rules` writes it."""
    trace, places = error.__traceback__, []
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT):
            places.append((path.relative_to(ROOT).as_posix(), trace.tb_lineno))
        trace = trace.tb_next
    found = (rule for place in reversed(places) for rule, lines in rules().items() if _is_at(place, rule, lines))
    return next(found, None)


def _is_at(place: tuple[str, int], rule: str, lines: range) -> bool:
    return rule.startswith(f"{place[0]}:") and place[1] in lines


@cache
def rules() -> dict[str, range]:
    """FILE:FUNCTION:NUMBER of every place that may refuse a layout, and its lines."""
    found: dict[str, range] = {}
    for path in sorted(
        p for folder in ("backends", "parallel", "train", "launch") for p in (ROOT / folder).rglob("*.py")
    ):
        name = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        for function in ast.walk(ast.parse(source)):
            if not isinstance(function, ast.FunctionDef) or f"{name}:{function.name}" in ELSEWHERE:
                continue
            if name.startswith(WHOLE) or any(key in text for text in _texts(function) for key in KEYS):
                places = sorted((n for n in ast.walk(function) if _refuses(n)), key=lambda node: node.lineno)
                for number, node in enumerate(places):
                    assert node.end_lineno is not None
                    found[f"{name}:{function.name}:{number}"] = range(node.lineno, node.end_lineno + 1)
    return found


def _texts(function: ast.FunctionDef) -> list[str]:
    """Its texts, without the docstring."""
    docstring = ast.get_docstring(function, clean=False)
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [str(node.value) for node in nodes if node.value != docstring]


def _refuses(node: ast.AST) -> bool:
    """`raise ConfigError(...)`, or a helper that makes or raises one."""
    call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
    named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id
    return named in ("ConfigError", "unknown_name_error", "check_finite", "_check_divides")
