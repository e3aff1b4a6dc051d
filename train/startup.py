"""What the start-up table says of a run: everything that was decided, printed once."""

from pathlib import Path

import torch

from octofold.backends.base import Backend
from octofold.backends.process_group import RankInfo
from octofold.kernels.registry import EMULATIONS, Choice
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig
from octofold.parallel.pipeline_split import split_layers
from octofold.train.build import COMPUTE_DTYPES, BuiltModel, micro_batches, rank_memory_bytes
from octofold.train.config import RunConfig
from octofold.train.data.build import Data
from octofold.train.memory import readable
from octofold.train.models.config import ModelConfig
from octofold.train.precision.policy import plan_rows

Section = dict[str, object]


def startup_sections(
    config: RunConfig,
    built: BuiltModel,
    backend: Backend,
    info: RankInfo,
    data: Data,
    run_dir: Path,
) -> dict[str, Section]:
    """Title of each section -> its rows."""
    train = config.train
    return {
        "model": _model(built),
        "layout": {
            "ranks": f"{info.world_size} ({backend.collective_library}), {built.topology.ranks_per_node} a node",
            **_layout(config.parallel, built.model.config),
        },
        "device": _device(built, backend, info),
        **({backend.collective_library: dict(settings)} if (settings := backend.group_settings()) else {}),
        "precision": _precision(config, built, backend, info),
        "kernels": _kernels(built.choices),
        "batch": {
            "global": f"{train.global_batch_size} sequences, "
            f"{train.global_batch_size * config.data.sequence_length:,} tokens",
            "per rank": f"{train.micro_batch_size} sequences x {micro_batches(train, config.parallel)} micro-batch(es)",
            "steps": train.steps,
        },
        "data": {
            "source": config.data.source + (f" {config.data.path}" if config.data.path else ""),
            "tokenizer": f"{config.data.tokenizer} ({data.tokenizer.vocab_size} entries)",
            "training": f"{len(data.train):,} sequences" if data.train else "streamed in order",
            "validation": f"{len(data.validation):,} sequences" if data.validation else "none",
        },
        "run": {"folder": str(run_dir), "seed": train.seed},
    }


def _model(built: BuiltModel) -> Section:
    shape = built.model.config
    return {
        "name": shape.name,
        "parameters": built.count.total,
        "active a token": built.count.active,
        "multi-token prediction": f"{built.count.mtp:,} parameters more" if built.count.mtp else "none",
        "layers": f"{shape.num_hidden_layers} ({len(built.names.gates)} with experts)",
        "experts": f"{shape.n_routed_experts} routed, {shape.num_experts_per_tok} a token, "
        f"{shape.n_shared_experts} shared",
        "vocabulary": shape.vocab_size,
    }


def _layout(degrees: ParallelConfig, shape: ModelConfig) -> Section:
    rows: Section = {name: getattr(degrees, name) for name in DENSE_DEGREES if getattr(degrees, name) > 1}
    slices = f", widths over {degrees.expert_tensor}" if degrees.expert_tensor > 1 else ""
    rows["expert"] = f"{degrees.expert} (x expert_data {degrees.expert_data}){slices}"
    if degrees.pipeline > 1:
        parts = split_layers(degrees, shape.num_hidden_layers, shape.num_nextn_predict_layers)
        layers = " + ".join(str(len(part.layers)) for part in parts)
        rows["pipeline stages"] = f"{degrees.pipeline_schedule}, {layers} layers"
    return rows


def _device(built: BuiltModel, backend: Backend, info: RankInfo) -> Section:
    need = built.need
    kept = f", {readable(need.kept_bytes)} of it weights kept in FP8" if need.kept_bytes else ""
    return {
        "backend": backend.name,
        "device": backend.capabilities(info.local_rank).device_name,
        "memory of a rank": readable(rank_memory_bytes(backend, info)),
        "weights, gradients, moments": readable(need.state_bytes),
        "gathered layers": f"{readable(need.gathered_bytes)}, gradients included (activations not counted){kept}",
    }


def _precision(config: RunConfig, built: BuiltModel, backend: Backend, info: RankInfo) -> Section:
    precision, degrees = config.precision, config.parallel
    compute_dtype = COMPUTE_DTYPES[precision.name]
    bf16 = "native" if backend.capabilities(info.local_rank).bf16 else "computed in FP32, rounded once"
    arithmetic = f" (BF16 products on this device: {bf16})" if compute_dtype == torch.bfloat16 else ""
    sends = degrees.expert * degrees.expert_tensor > 1
    return {
        "compute": precision.name + arithmetic,
        "master weights, gradients": "FP64" if precision.name == "fp64" else "FP32",
        "moments": "FP64" if precision.name == "fp64" else config.optim.moments.upper(),
        **plan_rows(precision, list(built.names.modules), compute_dtype=compute_dtype, sends=sends),
        **_emulated_gradients(config, built.choices),
    }


def _emulated_gradients(config: RunConfig, choices: list[Choice]) -> Section:
    """Where other products are native."""
    if config.precision.arithmetic != "native":
        return {}
    chosen = {choice.provider for choice in choices if choice.op == "scaled_grouped_inner_mm"}
    dtype = "BF16" if "npu" in chosen else "FP32" if chosen & set(EMULATIONS) else None
    if dtype is None:
        return {}
    told = f"{dtype} products of decoded operands, for scaled_grouped_inner_mm is not native"
    return {"experts' weight gradients": told}


def _kernels(choices: list[Choice]) -> Section:
    rows: Section = {}
    for choice in choices:
        reasons = "".join(f"; not {name}: {reason}" for name, reason in choice.rejected.items())
        rows[choice.op] = f"{choice.provider}{reasons}"
    return rows
