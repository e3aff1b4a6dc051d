"""Wiring: turns each part of the configuration into the object it concerns. The only file that knows all parts."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from octofold.backends import rank_table
from octofold.backends.base import Backend
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo
from octofold.backends.topology import Topology
from octofold.kernels.registry import Choice, Workload, choose
from octofold.parallel.apply import apply_plan
from octofold.parallel.config import ParallelConfig
from octofold.parallel.expert_routes import NodeOf, build_route
from octofold.parallel.mesh import Meshes, build_meshes
from octofold.parallel.pipeline import Pipeline
from octofold.parallel.pipeline_ends import SharedEnds
from octofold.parallel.pipeline_split import rank_of_stage, split_layers
from octofold.parallel.placement_moves import ExpertPlacement
from octofold.train.config import OptimConfig, RunConfig, TrainConfig
from octofold.train.engines.native import NativeEngine
from octofold.train.flops import Utilisation, flops_a_token, known_peaks
from octofold.train.memory import MemoryNeed, ParameterCount, count_parameters, memory_need, require_memory
from octofold.train.models.config import VOCABULARY_MULTIPLE, ModelConfig
from octofold.train.models.decoder import Decoder
from octofold.train.models.init import initialise
from octofold.train.models.registry import load_architecture
from octofold.train.models.stages import Stages
from octofold.train.optim.adamw import build_adamw, require_moments
from octofold.train.optim.schedule import learning_rate
from octofold.train.precision.apply import (
    apply_precision,
    apply_transport,
    forget_weights,
    fp8_states,
    kept_copies,
    reset_states,
    slots,
)
from octofold.train.precision.config import FP8, LossScaleConfig, PrecisionConfig
from octofold.train.precision.loss_scale import LossScaler
from octofold.train.precision.policy import recipe_for, require_arithmetic, require_products, require_whole_tiles
from octofold.train.precision.watch import Watch

COMPUTE_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, **dict.fromkeys(["bf16", *FP8], torch.bfloat16)}
"""By precision: what weights are gathered in, and all that is not in FP8 is computed in."""


@dataclass(frozen=True)
class Names:
    """Of the whole model, where a rank has a part of it."""

    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    """Those that may be in FP8."""
    delayed: tuple[str, ...]
    """Of `modules` those in FP8 with scales of past steps."""
    gates: tuple[int, ...]
    """Numbers of the layers with experts."""


@dataclass(frozen=True)
class BuiltModel:
    """A model split over its ranks, with what the start-up table says of it."""

    model: Decoder | Stages
    """Parameters on the meta device until `materialise`."""
    pipeline: Pipeline | None
    """What runs `Stages`."""
    names: Names
    meshes: Meshes
    topology: Topology
    choices: list[Choice]
    count: ParameterCount
    need: MemoryNeed


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


def draft_model(
    config: RunConfig,
    device: torch.device,
    tokenizer_size: int,
    *,
    training: bool = True,
    topology: Topology | None = None,
) -> BuiltModel:
    """The configured model over the default process group, without allocating it.

    Args:
        config: with `parallel` resolved.
        tokenizer_size: fills in a vocabulary size of 0.
        training: the memory counted includes gradients and moments.
        topology: None: all ranks stand on one node, unless the configuration says otherwise.
    """
    topology = topology or Topology.read(config.backend, RankInfo.of_one_machine())
    shape = model_config(config.model, tokenizer_size)
    compute_dtype = COMPUTE_DTYPES[config.precision.name]
    master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    architecture = load_architecture(shape.architecture)
    workload = Workload(
        device.type,
        compute_dtype,
        (shape.hidden_size, shape.moe_intermediate_size),
        experts=shape.n_routed_experts,
        expert_groups=shape.choice_groups,
    )
    kernels, choices = choose(config.kernels, workload)
    with torch.device("meta"):
        model = architecture(shape, kernels).to(master_dtype)
        if config.precision.is_fp8:
            # Which formats the providers must serve depends on the names of the model's modules.
            workload = fp8_workload(workload, config.precision, [name for name, _, _ in slots(model)])
            kernels, choices = choose(config.kernels, workload)
            model = architecture(shape, kernels).to(master_dtype)
            apply_precision(model, config.precision, kernels, turned_copies=device.type != "cpu")
    plan = model.plan()
    degrees = config.parallel
    require_whole_tiles(model, plan, config.precision, tensor=degrees.tensor, expert_tensor=degrees.expert_tensor)
    count = count_parameters(model, plan, shape.num_experts_per_tok / shape.n_routed_experts)
    names = Names(
        parameters=tuple(name for name, _ in model.named_parameters()),
        modules=tuple(name for name, _, _ in slots(model)),
        delayed=tuple(name for name, state in fp8_states(model).items() if state.recipe.delayed),
        gates=tuple(model.gates()),
    )
    meshes = build_meshes(config.parallel, device.type)
    here: Decoder | Stages = model if config.parallel.pipeline == 1 else stages_of(model, config.parallel, meshes)
    for part in [here] if isinstance(here, Decoder) else here.by_number.values():
        apply_plan(
            part,
            part.plan(),
            meshes,
            config.parallel,
            make_route=partial(build_route, config.parallel, device=device, node_of=topology.node),
            compute_dtype=compute_dtype,
            master_dtype=master_dtype,
        )
    apply_transport(here, config.precision)
    pipeline = build_pipeline(here, config, meshes, compute_dtype, device) if isinstance(here, Stages) else None
    moments = config.optim.moments if training else None
    need = memory_need(
        here,
        here.plan(),
        config.parallel,
        compute_dtype,
        moments=moments,
        micro_batches=micro_batches(config.train, config.parallel),
        kept_copies=kept_copies(here),
    )
    return BuiltModel(here, pipeline, names, meshes, topology, choices, count, need)


def stages_of(model: Decoder, parallel: ParallelConfig, meshes: Meshes) -> Stages:
    """The stages of an unsplit model that stand on this rank."""
    parts = split_layers(parallel, model.config.num_hidden_layers, model.config.num_nextn_predict_layers)
    ranks, own = rank_of_stage(parallel), meshes.rank("pipeline")
    return Stages({number: model.stage(part) for number, part in enumerate(parts) if ranks[number] == own})


def build_pipeline(
    stages: Stages, config: RunConfig, meshes: Meshes, compute_dtype: torch.dtype, device: torch.device
) -> Pipeline:
    """What runs the stages of this rank, split by `apply_plan`, together with those of other ranks."""
    train, parallel, shape = config.train, config.parallel, stages.config
    positions = config.data.sequence_length // (parallel.context * parallel.tensor)
    stream_shape = (train.micro_batch_size, positions, shape.hidden_size)
    return Pipeline(
        stages.by_number,
        parallel,
        meshes.dense.get_group("pipeline"),
        micro_batches=micro_batches(train, parallel),
        stream_BPD=torch.empty(stream_shape, dtype=compute_dtype, device="meta"),
        outputs=1 + shape.num_nextn_predict_layers,
        device=device,
    )


def fp8_workload(plain: Workload, precision: PrecisionConfig, modules: list[str]) -> Workload:
    """What the providers will be asked to do in FP8 besides.

    Args:
        modules: names of all modules that may be in FP8.
    """
    recipes = [recipe for name in modules if (recipe := recipe_for(precision, name)) is not None]
    formats = dict.fromkeys(format for recipe in recipes for format in recipe.formats)
    accumulation = "hopper" if any(recipe.accumulation == "hopper" for recipe in recipes) else "fp32"
    return replace(plain, formats=tuple(formats), accumulation=accumulation)


def materialise(drafted: BuiltModel, device: torch.device, *, seed: int) -> None:
    """Give a drafted model its memory and its initial weights, in place."""
    model = drafted.model
    model.to_empty(device=device)
    for gate in model.gates().values():
        gate.reset_balance()
    reset_states(model)
    initialise(model, seed=seed, std=model.config.initializer_range, stacked=model.plan().experts)


def build_model(config: RunConfig, device: torch.device, tokenizer_size: int) -> BuiltModel:
    """`draft_model` and `materialise`."""
    drafted = draft_model(config, device, tokenizer_size)
    materialise(drafted, device, seed=config.train.seed)
    return drafted


def draft_fitting(
    config: RunConfig, backend: Backend, info: RankInfo, tokenizer_size: int, *, training: bool = True
) -> BuiltModel:
    """`draft_model`, refused where it does not fit a rank's memory. Collective: all ranks decide alike.

    Raises:
        ConfigError: see `require_arithmetic`, `require_moments`, `require_products`, `require_memory`, `Topology.read`.
    """
    device = backend.device(info.local_rank)
    require_arithmetic(config.precision, backend.capabilities(info.local_rank))
    if training:
        require_moments(config.optim, backend.capabilities(info.local_rank))
    # HCCL alone reads it; beside another library it may be the table of some other job on this machine.
    named = os.environ.get(rank_table.VARIABLE) if backend.collective_library == "hccl" else None
    topology = Topology.read(config.backend, info, Path(named) if named else None)
    built = draft_model(config, device, tokenizer_size, training=training, topology=topology)
    if training:
        require_products(config.precision, config.kernels, built.choices)
    require_memory(
        config.model.name,
        built.count,
        built.need,
        memory_bytes=rank_memory_bytes(backend, info),
        ranks=info.world_size,
        expert=config.parallel.expert,
        experts=config.model.n_routed_experts,
        device=device,
    )
    return built


def micro_batches(train: TrainConfig, parallel: ParallelConfig) -> int:
    """That a rank accumulates in a step."""
    return train.global_batch_size // (train.micro_batch_size * parallel.data)


def rank_memory_bytes(backend: Backend, info: RankInfo) -> int:
    """What a rank may use of its device; the ranks of a machine share its host memory."""
    shared = info.local_world_size if backend.device(info.local_rank).type == "cpu" else 1
    return backend.capabilities(info.local_rank).memory_bytes // shared


def build_engine(
    model: Decoder | Stages,
    optim: OptimConfig,
    total_updates: int,
    loss_scale: LossScaleConfig | None = None,
    parallel: ParallelConfig | None = None,
    *,
    built: BuiltModel | None = None,
) -> NativeEngine:
    """The engine with its optimiser, schedule, loss scale (None: no scaling) and communication (None: the default).

    Args:
        built: that `model` belongs to, where it is a part of a model.
    """
    optimizer = build_adamw(model, optim, None if built is None else built.names.parameters)
    ends = None
    if isinstance(model, Stages):
        assert built is not None
        assert built.pipeline is not None
        ends = SharedEnds(*model.ends(), built.pipeline.group, built.pipeline.ranks[-1])
    optimizer.register_step_post_hook(lambda *_: forget_weights(model))
    return NativeEngine(
        model,
        optimizer,
        LossScaler(loss_scale or LossScaleConfig()),
        clip_norm=optim.clip_norm,
        learning_rate=lambda update: learning_rate(optim, update, total_updates),
        parallel=parallel,
        ends=ends,
    )


def build_watch(precision: PrecisionConfig, built: BuiltModel, device: torch.device) -> Watch:
    """The watch over all of the model's FP8 modules, of which this rank may have some."""
    names = [name for name in built.names.modules if recipe_for(precision, name) is not None]
    return Watch(fp8_states(built.model), precision.watch_every, device, names)


def build_placement(
    parallel: ParallelConfig, built: BuiltModel, engine: NativeEngine, node_of: NodeOf
) -> ExpertPlacement | None:
    """What moves experts between ranks; None where they stay."""
    if not parallel.placement_every:
        return None
    model, modules = built.model, dict(built.model.named_modules())
    owners = (modules[name.rpartition(".")[0]] for name in model.plan().experts)
    # The first ranks that share the experts stand for all who do, so that every rank decides alike.
    nodes = [node_of(rank) for rank in built.meshes.experts.mesh[0, 0, 0, :, 0].tolist()]
    return ExpertPlacement(
        built.names.gates,
        dict(zip(model.gates(), owners, strict=True)),
        built.meshes.whole.get_group("shard"),
        engine.alike,
        ranks=parallel.expert,
        nodes=len(set(nodes)),
        groups=model.config.n_group,
    )


def build_utilisation(config: RunConfig, built: BuiltModel, backend: Backend, info: RankInfo) -> Utilisation:
    """A rank's share of a step's operations, and the peaks of its device."""
    # Emulated and stored FP8 is multiplied in BF16.
    native = config.precision.arithmetic == "native"
    fp8 = {name for name in built.names.modules if native and recipe_for(config.precision, name) is not None}
    plain = "bf16" if config.precision.name in FP8 else config.precision.name
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length / info.world_size
    said = {"bf16": config.backend.peak_tflops_bf16, "fp8": config.backend.peak_tflops_fp8}
    return Utilisation(
        {k: tokens * flops for k, flops in flops_a_token(built.model.config, length, fp8.__contains__, plain).items()},
        known_peaks(backend.capabilities(info.local_rank).peak_flops, said),
    )
