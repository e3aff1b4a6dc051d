"""Wiring: turns each part of the configuration into the object it concerns. The only file that knows all parts."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from octofold.backends.base import Backend, Capabilities
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo
from octofold.kernels.registry import Choice, Workload, choose
from octofold.parallel.apply import apply_plan
from octofold.parallel.mesh import Meshes, build_meshes
from octofold.train.config import OptimConfig, RunConfig
from octofold.train.data.build import Data
from octofold.train.engines.native import NativeEngine
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder
from octofold.train.models.init import initialise
from octofold.train.models.registry import load_architecture
from octofold.train.optim.adamw import build_adamw
from octofold.train.optim.schedule import learning_rate

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class BuiltModel:
    """A model on its device, split and initialised, with what the start-up table says of it."""

    model: Decoder
    meshes: Meshes
    choices: list[Choice]
    total_parameters: int
    active_parameters: int


def model_config(model: ModelConfig, tokenizer_size: int) -> ModelConfig:
    """`model` with the vocabulary size filled in from the tokenizer where it is 0.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's.
    """
    if 0 < model.vocab_size < tokenizer_size:
        rule = f"the tokenizer has {tokenizer_size} entries, and each needs a row of the embedding"
        raise ConfigError("model.vocab_size", model.vocab_size, rule, "model.vocab_size=0 takes the tokenizer's size")
    if model.vocab_size:
        return model
    rounded = -(-tokenizer_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return replace(model, vocab_size=rounded)


def count_parameters(model: Decoder) -> tuple[int, int]:
    """Parameters in all, and those that one token passes through (its own experts; the whole embedding and head)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    stacked = [model.get_submodule(name) for name in model.plan().experts]
    routed = sum(parameter.numel() for module in stacked for parameter in module.parameters())
    share = model.config.num_experts_per_tok / model.config.n_routed_experts
    return total, total - routed + round(routed * share)


def build_model(config: RunConfig, device: torch.device, tokenizer_size: int) -> BuiltModel:
    """The configured model over the default process group. `config.parallel` must be resolved."""
    shape = model_config(config.model, tokenizer_size)
    compute_dtype = COMPUTE_DTYPES[config.precision.name]
    master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    workload = Workload(device.type, compute_dtype, (shape.hidden_size, shape.moe_intermediate_size))
    kernels, choices = choose(config.kernels, workload)
    with torch.device("meta"):
        model = load_architecture(shape.architecture)(shape, kernels).to(master_dtype)
    total, active = count_parameters(model)
    plan = model.plan()
    meshes = build_meshes(config.parallel, device.type)
    apply_plan(model, plan, meshes, compute_dtype=compute_dtype, master_dtype=master_dtype)
    model.to_empty(device=device)
    for gate in model.gates().values():
        gate.reset_balance()
    initialise(model, seed=config.train.seed, std=shape.initializer_range, stacked=plan.experts)
    return BuiltModel(model, meshes, choices, total, active)


def build_engine(model: Decoder, optim: OptimConfig, total_updates: int) -> NativeEngine:
    """The engine with its optimiser and schedule."""
    return NativeEngine(
        model,
        build_adamw(model, optim),
        clip_norm=optim.clip_norm,
        learning_rate=lambda update: learning_rate(optim, update, total_updates),
    )


def startup_sections(
    config: RunConfig,
    built: BuiltModel,
    backend: Backend,
    capabilities: Capabilities,
    info: RankInfo,
    data: Data,
    run_dir: Path,
) -> dict[str, dict[str, object]]:
    """What was decided, for the start-up table."""
    shape, degrees, train = built.model.config, config.parallel, config.train
    accumulation = train.global_batch_size // (train.micro_batch_size * degrees.data)
    tokens = train.global_batch_size * config.data.sequence_length
    bf16 = "native" if capabilities.bf16 else "emulated by the library: slow"
    arithmetic = f" (products on this device: {bf16})" if config.precision.name == "bf16" else ""
    kernels: dict[str, object] = {}
    for choice in built.choices:
        reasons = "".join(f"; not {name}: {reason}" for name, reason in choice.rejected.items())
        kernels[choice.op] = f"{choice.provider}{reasons}"
    return {
        "model": {
            "name": shape.name,
            "parameters": built.total_parameters,
            "active a token": built.active_parameters,
            "layers": f"{shape.num_hidden_layers} ({len(built.model.gates())} with experts)",
            "experts": f"{shape.n_routed_experts} routed, {shape.num_experts_per_tok} a token, "
            f"{shape.n_shared_experts} shared",
            "vocabulary": shape.vocab_size,
        },
        "layout": {
            "ranks": f"{info.world_size} ({backend.collective_library})",
            "data_shard": degrees.data_shard,
            "expert": f"{degrees.expert} (x expert_data {degrees.expert_data})",
        },
        "device": {
            "backend": backend.name,
            "device": capabilities.device_name,
            "memory": f"{capabilities.memory_bytes / 2**30:.1f} GiB",
        },
        "precision": {
            "compute": config.precision.name + arithmetic,
            "master weights, gradients, moments": "fp64" if config.precision.name == "fp64" else "fp32",
        },
        "kernels": kernels,
        "batch": {
            "global": f"{train.global_batch_size} sequences, {tokens:,} tokens",
            "per rank": f"{train.micro_batch_size} sequences x {accumulation} micro-batch(es)",
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
