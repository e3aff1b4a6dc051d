"""A job in small: the same kinds of everything, the same layout, sizes that CPUs prove in seconds. Torch-free.

Dimensions shrink, structure stays: groups of experts, low-rank projections, shared experts, dense first layers,
multi-token prediction, balance losses, document masks, accumulation. Degrees of parallelism shrink where the world has
more ranks than a machine can play, and none that is above 1 becomes 1.
"""

import random
from dataclasses import replace
from math import gcd, lcm, prod
from pathlib import Path
from typing import Any

from octofold.backends.config import BackendConfig
from octofold.backends.errors import ConfigError
from octofold.kernels.config import KernelsConfig
from octofold.parallel.config import DENSE_DEGREES, ParallelConfig
from octofold.parallel.pipeline_split import stages_a_rank
from octofold.train.config import OptimConfig, RunConfig, TrainConfig
from octofold.train.data.config import DataConfig
from octofold.train.models.config import VOCABULARY_MULTIPLE, ModelConfig
from octofold.train.precision.config import PrecisionConfig

TINY_HIDDEN, TINY_LAYERS, TINY_EXPERTS = 128, 8, 64
"""A model within all of these stays as it is."""
SEQUENCE = 64
ENTRIES = 320
"""Of the vocabulary: bytes and what stands for no byte, rounded up."""
DOCUMENTS = 240


def smallest_world(parallel: ParallelConfig) -> int:
    """Ranks of the smallest job with these degrees; an inferred `data_shard` becomes what the experts need at least.

    A degree below 1, which the rules refuse, counts as 1.
    """
    degree = {name: max(1, getattr(parallel, name)) for name in (*DENSE_DEGREES, "expert", "expert_tensor")}
    if parallel.data_shard == -1:
        inner = degree["context"] * degree["tensor"]
        degree["data_shard"] = lcm(degree["expert"] * degree["expert_tensor"], inner) // inner
    return prod(degree[name] for name in DENSE_DEGREES)


def shrunk(parallel: ParallelConfig, most: int) -> ParallelConfig:
    """Resolved degrees, the largest halved until the world has at most so many ranks, none that is above 1 below 2.

    That holds for the copies of each expert, too (`expert_data`), whose gradients are summed.

    Raises:
        ConfigError: so few ranks cannot hold the degrees, or no split of the experts would be left.
    """
    asked, world = parallel.pipeline, prod(d for _, d in _degrees(parallel))
    copies = _span(parallel) // (parallel.expert * parallel.expert_tensor)
    copied = min((factor for factor in range(2, copies + 1) if copies % factor == 0), default=1)
    least = copied * min(parallel.expert, 2) * min(parallel.expert_tensor, 2)
    if world <= most:
        return parallel
    while world > most:
        halved = [_with(parallel, n, max(2, d // 2)) for n, d in _degrees(parallel) if d > 2]
        halved = [candidate for candidate in halved if _span(candidate) >= least]
        if not halved:
            break
        # The largest degree is the one whose half leaves the smallest of the largest degrees.
        parallel = min(halved, key=lambda candidate: sorted((d for _, d in _degrees(candidate)), reverse=True))
        world = prod(d for _, d in _degrees(parallel))
    if world > most:
        left = " ".join(f"{name}={degree}" for name, degree in _degrees(parallel) if degree > 1)
        rule = f"the degrees shrink to {left}, which take {world} ranks: none that is above 1 becomes 1"
        raise ConfigError("verify.ranks", most, rule, f"verify.ranks={world}, or fewer degrees above 1")
    span = _span(parallel)
    room = span // copied if span % copied == 0 else span
    expert_tensor = gcd(parallel.expert_tensor, room // min(parallel.expert, 2))
    split = parallel.pipeline_split if parallel.pipeline == asked else []
    expert = gcd(parallel.expert, room // expert_tensor)
    if (expert == 1 < parallel.expert) or (expert_tensor == 1 < parallel.expert_tensor):
        shown = f"verify.ranks={most} parallel.expert={parallel.expert} parallel.expert_tensor={parallel.expert_tensor}"
        rule = f"the degrees shrink to {world} rank(s), of which {span} span the experts: no split of them is left"
        raise ConfigError("verify.ranks", shown, rule, "a larger verify.ranks, or degrees that are powers of two")
    return replace(parallel, expert_tensor=expert_tensor, expert=expert, pipeline_split=split)


def _degrees(parallel: ParallelConfig) -> list[tuple[str, int]]:
    return [(name, getattr(parallel, name)) for name in DENSE_DEGREES]


def _with(parallel: ParallelConfig, name: str, degree: int) -> ParallelConfig:
    changed: dict[str, Any] = {name: degree}
    return replace(parallel, **changed)


def _span(parallel: ParallelConfig) -> int:
    """Ranks over which experts are laid out."""
    return parallel.data_shard * parallel.context * parallel.tensor


def twin(config: RunConfig, folder: Path, *, steps: int, precision: PrecisionConfig) -> RunConfig:
    """The job in small, on text of its own in `folder`; still to be validated.

    Args:
        config: with `parallel` resolved, and small enough.
    """
    parallel, train = config.parallel, config.train
    accumulation = train.global_batch_size // (train.micro_batch_size * parallel.data)
    micro = min(train.micro_batch_size, 2)
    # As many as fill a pipeline of any schedule; one or two otherwise.
    micro_batches = 2 * parallel.pipeline if parallel.pipeline > 1 else min(accumulation, 2)
    model = small_model(config.model, parallel)
    if model.num_hidden_layers != config.model.num_hidden_layers:
        parallel = replace(parallel, pipeline_split=[])
    return replace(
        config,
        resume=None,
        model=model,
        # Sums in BF16 round by design. Experts that move do so within the few steps.
        parallel=replace(parallel, reduce_dtype="master", placement_every=min(parallel.placement_every, 1)),
        data=_small_data(config.data, parallel, folder),
        precision=precision,
        optim=_small_optim(config.optim, precision),
        train=TrainConfig(
            steps=steps,
            global_batch_size=micro * micro_batches * parallel.data,
            micro_batch_size=micro,
            seed=train.seed,
            deterministic=True,
            log_every=1,
            eval_every=0,
            sample_tokens=0,
        ),
        backend=_small_backend(config),
        kernels=KernelsConfig(),
    )


def is_tiny(model: ModelConfig) -> bool:
    """Whether a model can be proved as it is."""
    return (
        model.hidden_size <= TINY_HIDDEN
        and model.num_hidden_layers <= TINY_LAYERS
        and model.n_routed_experts <= TINY_EXPERTS
    )


def small_model(model: ModelConfig, parallel: ParallelConfig) -> ModelConfig:
    """The model's structure in tiny dimensions that the degrees divide; a tiny model as it is, but for balancing.

    Biases move faster, so that three steps change who is chosen.
    """
    balance = model.balance
    if balance.bias_update_rate:
        model = replace(model, balance=replace(balance, bias_update_rate=max(balance.bias_update_rate, 0.02)))
    divided = VOCABULARY_MULTIPLE % parallel.tensor == 0
    model = replace(model, vocab_size=0 if divided else lcm(ENTRIES, parallel.tensor))
    if is_tiny(model):
        return model
    tensor, chosen = parallel.tensor, min(model.num_experts_per_tok, 8)
    # One layer more than stages, so that they are not equal.
    layers = min(model.num_hidden_layers, max(4, parallel.pipeline * stages_a_rank(parallel) + 1))
    expert_width = 32 * parallel.expert_tensor
    return replace(
        model,
        hidden_size=lcm(64, tensor),
        num_hidden_layers=layers,
        first_k_dense_replace=min(model.first_k_dense_replace, 1 if layers < model.num_hidden_layers else layers),
        intermediate_size=lcm(192, tensor),
        # Logits of size 1, so that a mistake shows.
        initializer_range=max(model.initializer_range, 0.1),
        num_attention_heads=lcm(4, tensor),
        q_lora_rank=None if model.q_lora_rank is None else 48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=_experts(model, parallel.expert, chosen),
        num_experts_per_tok=chosen,
        moe_intermediate_size=expert_width,
        num_nextn_predict_layers=min(model.num_nextn_predict_layers, 2),
        max_position_embeddings=max(model.max_position_embeddings, SEQUENCE) if model.max_position_embeddings else 0,
    )


def _experts(model: ModelConfig, degree: int, chosen: int) -> int:
    """The fewest experts that groups and ranks divide, with a choice among them: twice as many as a token takes."""
    step = lcm(model.n_group, degree)
    reachable = 2 * chosen * model.n_group // model.topk_group
    least = min(model.n_routed_experts, max(reachable, 2 * model.n_group))
    return -(-least // step) * step


def _small_optim(optim: OptimConfig, precision: PrecisionConfig) -> OptimConfig:
    moments = "fp32" if precision.name == "fp64" else optim.moments
    return replace(optim, moments=moments, warmup_steps=min(optim.warmup_steps, 2))


def _small_backend(config: RunConfig) -> BackendConfig:
    """CPUs, or software NPUs; two nodes where experts are reached over several."""
    ranks = prod(getattr(config.parallel, name) for name in DENSE_DEGREES)
    several = 0 < config.backend.ranks_per_node < ranks
    several = several or config.parallel.expert_route == "two_stage" or config.backend.all_reduce == "hierarchical"
    # One thread a rank: how a sum is split over threads decides its last bits.
    nodes = ranks // 2 if several and ranks % 2 == 0 else 0
    return replace(proving(config.backend), ranks_per_node=nodes)


def proving(asked: BackendConfig) -> BackendConfig:
    """What ranks of a proof are: CPUs, or software NPUs where those are asked for; whose nodes are not given."""
    name = "ascend" if asked.software else "cpu"
    return BackendConfig(name=name, software=asked.software, threads=1, all_reduce=asked.all_reduce)


def _small_data(data: DataConfig, parallel: ParallelConfig, folder: Path) -> DataConfig:
    step = parallel.context * parallel.tensor * (2 if parallel.context > 1 else 1)
    length = -(-min(data.sequence_length, SEQUENCE) // step) * step
    return DataConfig(
        source="text",
        path=str(write_text(folder / "text")),
        sequence_length=length,
        mask_documents=data.mask_documents,
        validation_share=0.0,
        cache_dir=str(folder / "cache"),
    )


def write_text(folder: Path, documents: int = DOCUMENTS) -> Path:
    """Text files of 5 to 200 bytes, the same on every call, so that sequences hold few or many of them."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "experts", "idle", "and"]
    choose = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(choose.choices(words, k=choose.choice([1, 2, 4, 8, 40])))
        (folder / f"{number:03}.txt").write_text(f"{number}: {text}.\n", encoding="utf-8")
    return folder
