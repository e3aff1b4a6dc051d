"""What a training run is told: one frozen dataclass for each part, and the rules that bind several. Torch-free."""

from dataclasses import dataclass, field, replace

from octofold.backends.config import BackendConfig
from octofold.backends.config import check as check_backend
from octofold.backends.errors import ConfigError, check_finite, unknown_name_error
from octofold.kernels.config import KernelsConfig
from octofold.parallel.config import DEEPEP_TILE, ParallelConfig, resolve
from octofold.parallel.pipeline_split import check_pipeline
from octofold.train.data.config import DataConfig
from octofold.train.data.config import check as check_data
from octofold.train.models.config import VOCABULARY_MULTIPLE, ModelConfig
from octofold.train.models.config import check as check_model
from octofold.train.precision.config import PrecisionConfig, dispatch_tile
from octofold.train.precision.config import check as check_precision

SCHEDULES = ["cosine", "wsd", "constant"]
LEAST_SPIKE_FACTOR = 3.0
ON_ANOMALY = ["skip", "rollback", "stop"]
MOMENT_BITS = {"fp32": (24, 24), "bf16": (8, 8), "fp8": (4, 8)}
"""Significant bits of the two moments."""


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` group: AdamW and its learning-rate schedule, counted in applied updates."""

    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: str = "fp32"
    """What AdamW's two moments are kept in: fp32 (fp64 under precision=fp64); bf16 (DeepSeek-V3); fp8 (the first in
    tiles of 128 with a scale each, the second in BF16); auto: bf16 where linear layers are in FP8, else fp32. Updates
    are computed in FP32."""
    no_decay: list[str] = field(default_factory=lambda: ["*norm*", "embed_tokens.*"])
    """Names of parameters without weight decay, with * and ?. A tied head is the embedding: embed_tokens.weight."""
    clip_norm: float = 1.0
    """Bound of the global gradient norm; 0 switches clipping off."""
    schedule: str = "cosine"
    """cosine: warm-up, then cosine to lr * min_lr_ratio; wsd: warm-up, stable, linear decay; constant: warm-up only."""
    warmup_steps: int = 50
    decay_share: float = 0.2
    """wsd: share of the steps spent in the final decay."""
    min_lr_ratio: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """The `train` group: how long, how much at a time, and what is reported."""

    steps: int = 500
    global_batch_size: int = 8
    """Sequences an update."""
    micro_batch_size: int = 4
    """Sequences a rank computes at once; accumulation makes up the rest."""
    seed: int = 0
    deterministic: bool = True
    """On CPUs and Ascend: deterministic kernels and sums over ranks, and no operation that has none. On Ascend it costs
    speed."""
    log_every: int = 10
    eval_every: int = 100
    """Steps between evaluations on the validation split; 0: only at the end."""
    eval_sequences: int = 64
    final_eval_sequences: int = 1024
    """Sequences of the closing evaluation, which stands beside n-gram models of the whole validation split."""
    sample_prompt: str = "def "
    sample_tokens: int = 200
    """Tokens of the sample printed at the end; 0: none."""
    on_anomaly: str = "skip"
    """After a step whose loss or gradient norm is not finite, or spikes, and which is never applied. skip: go on with
    the next batch; rollback: go back to the newest valid checkpoint and leave the batch out; stop: end the run."""
    max_anomalies: int = 20
    """That a run survives within `anomaly_window` steps; one more ends it. An overflow that a smaller dynamic loss
    scale may cure is none."""
    anomaly_window: int = 100
    spike_factor: float = 0.0
    """A loss or gradient norm that stands above the median of the last steps by this many of their standard deviations
    (robustly estimated) is a spike; 0: spikes are trained on. 10 raises no alarm on a healthy run."""
    check_replicas_every: int = 0
    """Steps between comparisons, bit for bit, of what several ranks hold copies of; 0: none. Copies that differ end the
    run, or with on_anomaly=rollback send it back."""
    recheck_every: int = 0
    """Steps between those whose forward and backward passes are done twice and compared bit for bit; 0: none. What a
    rank computes otherwise the second time is an error of its device."""
    log_communication: bool = True
    """Count and time collectives into the metrics."""
    hang_timeout_s: float = 300.0
    """A rank that sees no step and no collective begin or end for so long writes down where all its threads stand, and
    ends; 0: never. The first step, evaluations and saves have four times as long."""
    slow_rank_factor: float = 2.0
    """A rank that computes so many times as long as the median of its pipeline stage is named; 0: none is."""
    wandb: bool = False
    """Also log to Weights & Biases (offline unless logged in)."""
    tensorboard: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group."""

    every_steps: int = 200
    """Steps between checkpoints; the last step is always saved."""
    dir: str | None = None
    """Where they lie: a path, or a URL that fsspec can open; null: RUN/checkpoints. The same place for all ranks."""
    asynchronous: bool = True
    """Training goes on once tensors are copied to host memory, which takes as much of it as they do."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_hours: float = 0.0
    """Also kept are checkpoints younger than this."""
    keep_every_steps: int = 0
    """Also kept are checkpoints of multiples of this step; 0: none."""
    max_failures: int = 3
    """Saves in a row that may fail; each is warned of, and tried again at the next interval."""
    retry_s: float = 10.0
    """How long after a failed last save of a run it is tried again; a third time after three times as long."""


@dataclass(frozen=True)
class EngineConfig:
    """The `engine` group: who owns the optimiser step."""

    name: str = "native"


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run is told. `build.py` hands each part to the object it concerns, never the whole."""

    name: str = "run"
    """A word for people: it starts the run folder's name and heads the report."""
    run_dir: str | None = None
    """Folder of the run; null makes runs/<name>-<time>."""
    resume: str | None = None
    """A run folder (its newest valid checkpoint) or a checkpoint to continue from; `auto` continues run_dir where it
    holds a checkpoint, and begins there otherwise; `latest` continues the run in runs/ that saved last."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def validate(config: RunConfig, world_size: int) -> RunConfig:
    """The config with inferred degrees filled in, after every rule that needs neither torch nor a device.

    Raises:
        ConfigError: naming the keys, their values, the rule and the remedy.
    """
    check_model(config.model)
    check_data(config.data)
    check_precision(config.precision)
    check_backend(config.backend, world_size)
    if config.engine.name != "native":
        raise unknown_name_error("engine.name", config.engine.name, ["native"])
    config = replace(config, parallel=resolve(config.parallel, world_size))
    _check_counts(config)
    check_finite("checkpoint.keep_hours", config.checkpoint.keep_hours, least=0.0)
    _check_optim(config.optim)
    if config.optim.moments == "auto":
        moments = "bf16" if config.precision.is_fp8 else "fp32"
        config = replace(config, optim=replace(config.optim, moments=moments))
    _check_moments(config.optim, config.precision)
    _check_anomalies(config.train)
    _check_batch(config.train, config.parallel)
    _check_faults(config)
    _check_reduction(config)
    _check_experts(config)
    _check_length(config)
    _check_tensor(config)
    train, parallel = config.train, config.parallel
    micro_batches = train.global_batch_size // (train.micro_batch_size * parallel.data)
    check_pipeline(parallel, config.model.num_hidden_layers, micro_batches)
    return config


def _check_optim(optim: OptimConfig) -> None:
    if optim.schedule not in SCHEDULES:
        raise unknown_name_error("optim.schedule", optim.schedule, SCHEDULES)
    for name in ("lr", "eps", "weight_decay", "clip_norm", "warmup_steps"):
        check_finite(f"optim.{name}", getattr(optim, name), least=0.0)
    for name in ("beta1", "beta2", "decay_share", "min_lr_ratio"):
        value = getattr(optim, name)
        if not 0 <= value <= 1 or (name.startswith("beta") and value == 1):
            raise ConfigError(f"optim.{name}", value, "must lie between 0 and 1", f"optim.{name}=0.9")


def _check_moments(optim: OptimConfig, precision: PrecisionConfig) -> None:
    if optim.moments not in MOMENT_BITS:
        raise unknown_name_error("optim.moments", optim.moments, ["auto", *MOMENT_BITS])
    if optim.moments != "fp32" and precision.name == "fp64":
        shown = f"optim.moments={optim.moments} precision.name=fp64"
        rule = "under fp64 everything of the optimiser is FP64"
        raise ConfigError("optim.moments", shown, rule, "optim.moments=fp32, or precision=bf16")
    for name, bits in zip(("beta1", "beta2"), MOMENT_BITS[optim.moments], strict=True):
        if 1 - getattr(optim, name) < 2.0**-bits:
            shown = f"optim.moments={optim.moments} optim.{name}={getattr(optim, name)}"
            rule = f"a moment of {bits} significant bits is rounded back where an update takes less than 1/{2**bits}"
            raise ConfigError(f"optim.{name}", shown, rule, f"optim.{name}={1 - 2.0**-bits:g} or less, or moments=fp32")


def _check_counts(config: RunConfig) -> None:
    at_least = {
        "train.steps": 1,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.eval_sequences": 1,
        "train.final_eval_sequences": 1,
        "train.sample_tokens": 0,
        "train.max_anomalies": 0,
        "train.anomaly_window": 1,
        "train.check_replicas_every": 0,
        "train.recheck_every": 0,
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 0,
        "checkpoint.keep_every_steps": 0,
        "checkpoint.max_failures": 1,
        "backend.threads": 0,
    }
    for key, least in at_least.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if value < least:
            raise ConfigError(key, value, f"must be at least {least}", f"{key}={least} or more")


def _check_anomalies(train: TrainConfig) -> None:
    if train.on_anomaly not in ON_ANOMALY:
        raise unknown_name_error("train.on_anomaly", train.on_anomaly, ON_ANOMALY)
    check_finite("train.spike_factor", train.spike_factor, least=0.0)
    if 0 < train.spike_factor < LEAST_SPIKE_FACTOR:
        rule = f"one step in a hundred of a healthy run stands {LEAST_SPIKE_FACTOR:g} deviations above the others"
        remedy = f"train.spike_factor=10, {LEAST_SPIKE_FACTOR:g} at the least, or 0 for none"
        raise ConfigError("train.spike_factor", train.spike_factor, rule, remedy)


def _check_batch(train: TrainConfig, parallel: ParallelConfig) -> None:
    share = train.micro_batch_size * parallel.data
    if train.global_batch_size % share:
        shown = (
            f"train.global_batch_size={train.global_batch_size} train.micro_batch_size={train.micro_batch_size} "
            f"parallel.data_replicate={parallel.data_replicate} parallel.data_shard={parallel.data_shard}"
        )
        rule = f"the global batch must be a multiple of micro batch x data ranks = {share} sequences"
        nearest = max(share, train.global_batch_size // share * share)
        raise ConfigError("train.global_batch_size", shown, rule, f"train.global_batch_size={nearest}")


def _check_faults(config: RunConfig) -> None:
    hang_s, call_s, factor = config.train.hang_timeout_s, config.backend.timeout_s, config.train.slow_rank_factor
    check_finite("train.hang_timeout_s", hang_s, least=0.0)
    check_finite("checkpoint.retry_s", config.checkpoint.retry_s, least=0.0)
    check_finite("train.slow_rank_factor", factor, least=0.0)
    if hang_s >= call_s:
        shown = f"train.hang_timeout_s={hang_s:g} backend.timeout_s={call_s:g}"
        rule = "a hang is seen, and who is missing, before the library ends the collective"
        remedy = f"train.hang_timeout_s={call_s / 2:g}, or 0 for no watchdog"
        raise ConfigError("train.hang_timeout_s", shown, rule, remedy)
    if 0 < factor <= 1:
        rule = "a factor above the usual"
        raise ConfigError("train.slow_rank_factor", factor, rule, "train.slow_rank_factor=2, or 0 for none")


def _check_reduction(config: RunConfig) -> None:
    parallel, train = config.parallel, config.train
    if parallel.reduce_dtype != "bf16":
        return
    if config.precision.name == "fp64":
        shown, rule = "parallel.reduce_dtype=bf16 precision.name=fp64", "under fp64 gradients are summed in FP64"
        raise ConfigError("parallel.reduce_dtype", shown, rule, "parallel.reduce_dtype=master, or precision=bf16")
    if parallel.accumulate == "unreduced" and train.global_batch_size > train.micro_batch_size * parallel.data:
        shown = (
            "parallel.reduce_dtype=bf16 parallel.accumulate=unreduced "
            f"train.global_batch_size={train.global_batch_size} train.micro_batch_size={train.micro_batch_size}"
        )
        rule = "unreduced gradients are added up over micro-batches in the dtype they are reduced in: not in BF16"
        raise ConfigError("parallel.reduce_dtype", shown, rule, "parallel.accumulate=reduced, or reduce_dtype=master")


def _check_experts(config: RunConfig) -> None:
    experts, degree = config.model.n_routed_experts, config.parallel.expert
    if experts % degree:
        legal = [d for d in range(1, experts + 1) if experts % d == 0]
        shown = f"model.n_routed_experts={experts} parallel.expert={degree}"
        raise ConfigError("parallel.expert", shown, "every rank holds the same number of experts", f"one of {legal}")
    width, slices = config.model.moe_intermediate_size, config.parallel.expert_tensor
    if width % slices:
        legal = [d for d in range(1, width + 1) if width % d == 0]
        shown = f"model.moe_intermediate_size={width} parallel.expert_tensor={slices}"
        rule = "every rank holds as much of each expert's width"
        raise ConfigError("parallel.expert_tensor", shown, rule, f"one of {legal[:12]}")
    if config.parallel.expert_route == "deepep":
        _check_deepep(config.model, config.precision)


def _check_deepep(model: ModelConfig, precision: PrecisionConfig) -> None:
    """What the library moves: rows of BF16, and of E4M3 with a scale for 128 numbers."""
    route = "parallel.expert_route=deepep"
    if precision.name in ("fp32", "fp64"):
        rule = "DeepEP moves BF16 and E4M3, no wider numbers"
        shown = f"{route} precision.name={precision.name}"
        raise ConfigError("parallel.expert_route", shown, rule, "precision=bf16, or parallel.expert_route=two_stage")
    names = [f"layers.{layer}" for layer in range(model.num_hidden_layers)]
    names += [f"mtp.{depth}.block" for depth in range(model.num_nextn_predict_layers)]
    for layer, name in enumerate(names):
        tile = dispatch_tile(precision, f"{name}.mlp.experts") if model.mlp_kind(layer) == "experts" else None
        if tile is not None and (tile != DEEPEP_TILE or model.hidden_size % DEEPEP_TILE):
            shown = f"{route} model.hidden_size={model.hidden_size}, tokens to {name} in FP8 tiles of {tile}"
            rule = f"DeepEP's FP8 rows are whole tiles of {DEEPEP_TILE} numbers"
            raise ConfigError("parallel.expert_route", shown, rule, "precision.dispatch=bf16, or precision.block=128")


def _check_tensor(config: RunConfig) -> None:
    """What tensor and context ranks divide."""
    model, tensor, context = config.model, config.parallel.tensor, config.parallel.context
    shared = model.n_shared_experts * model.moe_intermediate_size
    sizes = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.n_shared_experts x model.moe_intermediate_size": shared,
        "model.vocab_size": model.vocab_size,
    }
    for name, size in sizes.items():
        if size % tensor:
            legal = [d for d in range(1, size + 1) if size % d == 0]
            shown = f"{name}={size} parallel.tensor={tensor}"
            raise ConfigError("parallel.tensor", shown, "tensor ranks divide it evenly", f"one of {legal[:12]}")
    if not model.vocab_size and VOCABULARY_MULTIPLE % tensor:
        shown = f"model.vocab_size=0 parallel.tensor={tensor}"
        rule = f"the tokenizer's size is rounded up to a multiple of {VOCABULARY_MULTIPLE}, which tensor ranks divide"
        raise ConfigError("parallel.tensor", shown, rule, f"model.vocab_size=a multiple of {tensor} that holds it")
    # Each context rank holds one part of the front half and one of the back half.
    pieces = tensor * context * (2 if context > 1 else 1)
    if config.data.sequence_length % pieces:
        shown = (
            f"data.sequence_length={config.data.sequence_length} parallel.context={context} parallel.tensor={tensor}"
        )
        rule = f"positions are divided into {pieces} equal parts: 2 for each of several context ranks, x tensor"
        length = max(config.data.sequence_length // pieces, 1) * pieces
        raise ConfigError("data.sequence_length", shown, rule, f"data.sequence_length={length}")


def _check_length(config: RunConfig) -> None:
    model, length = config.model, config.data.sequence_length
    if model.max_position_embeddings and length > model.max_position_embeddings:
        shown = f"data.sequence_length={length} model.max_position_embeddings={model.max_position_embeddings}"
        rule = "a sequence is no longer than the model is meant for"
        raise ConfigError(
            "data.sequence_length", shown, rule, f"data.sequence_length={model.max_position_embeddings} or less"
        )
    if model.num_nextn_predict_layers >= length:
        shown = f"model.num_nextn_predict_layers={model.num_nextn_predict_layers} data.sequence_length={length}"
        rule = "a sequence is longer than multi-token prediction looks ahead"
        raise ConfigError("model.num_nextn_predict_layers", shown, rule, "a longer sequence, or fewer layers")
