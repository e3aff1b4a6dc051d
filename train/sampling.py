"""Text from a model: one token at a time, over a cache of latents."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from octofold.backends.collectives import broadcast
from octofold.backends.errors import UserError
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.parallel.config import ParallelConfig
from octofold.parallel.config import resolve as resolve_degrees
from octofold.parallel.data import let_go
from octofold.parallel.pipeline import Pipeline
from octofold.train.build import COMPUTE_DTYPES, draft_fitting, materialise, rank_memory_bytes
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import RunConfig
from octofold.train.data.tokenizer import Tokenizer, load_saved_tokenizer
from octofold.train.engines.native import model_tensors
from octofold.train.models.attention import LatentCache
from octofold.train.models.decoder import Decoder
from octofold.train.models.stages import Stages
from octofold.train.precision.policy import lacking_arithmetic

NOT_FINITE = -1
"""In place of a token, that the logits are not finite; told to every rank, so that none waits for it."""


@torch.no_grad()
def generate(
    model: Decoder | Stages,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    pipeline: Pipeline | None = None,
    tokens: int,
    context: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device,
) -> str:
    """The prompt continued by up to `tokens` tokens; ends early at the tokenizer's end-of-text.

    Arguments as in `generate_ids`. Leaves the model in training mode.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]
    continued = generate_ids(
        model,
        ids,
        pipeline=pipeline,
        tokens=tokens,
        context=context,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
    )
    model.train()
    let_go(model)
    return tokenizer.decode([*ids, *continued])


@torch.no_grad()
def generate_ids(
    model: Decoder | Stages,
    ids: Sequence[int],
    *,
    pipeline: Pipeline | None = None,
    tokens: int,
    context: int,
    vocab_size: int,
    eos_id: int | None,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Up to `tokens` tokens that follow `ids`, without the end-of-text that ends them early.

    The end of `ids` is read at once, then each token by itself: it is computed from the cached latents of those before
    it. When `context` tokens are cached, the newer half of them is read again into an empty cache, and so on.
    Collective: every rank passes the same arguments and draws the same tokens. Leaves the model in evaluation mode.

    Args:
        pipeline: runs the model where it stands on several ranks.
        context: the model sees at most this many tokens back, and no more are cached; at least 1.
        vocab_size: ids from here on are never drawn (rows of the head that only pad it).
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0: among all.

    Raises:
        UserError: the model's logits are not finite.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids, prompt = list(ids), len(ids)
    length, unread, caches = None, ids[-context:], dict[int, LatentCache]()
    for _ in range(tokens):
        if length is None or length + len(unread) > context:
            unread = ids[-context:] if length is None else ids[-max(context // 2, 1) :]
            # One for each stage of a pipeline that is here.
            numbers = [0] if pipeline is None else list(pipeline.stages)
            caches = {number: LatentCache(model.config.num_hidden_layers, capacity=context) for number in numbers}
            length = 0
        tokens_1S = torch.tensor([unread], device=device)
        positions_1S = torch.arange(length, length + len(unread), device=device)[None]
        if pipeline is None:
            logits_1SV = model(tokens_1S, positions_1S, cache=caches[0])
        else:
            logits_1SV = pipeline.forward(tokens_1S, caches, positions_BQ=positions_1S)
        length += len(unread)
        drawn = NOT_FINITE  # of a rank that does not know the logits
        if logits_1SV is not None:
            drawn = _draw(logits_1SV[0, -1, :vocab_size].double().cpu(), temperature, top_k, generator)
        chosen = _agree(drawn, device, 0 if pipeline is None else pipeline.speaker)
        if chosen == NOT_FINITE:
            raise UserError(
                "the model's logits are not finite\n  remedy: sample from an earlier checkpoint (RUN/checkpoints)"
            )
        if chosen == eos_id:
            break
        ids.append(chosen)
        unread = [chosen]
    return ids[prompt:]


def _draw(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not torch.isfinite(logits_V).all():
        return NOT_FINITE
    kept = 1 if temperature == 0 else min(top_k or len(logits_V), len(logits_V))
    logits_K, ids_K = logits_V.topk(kept)
    if kept == 1:
        return int(ids_K)
    return int(ids_K[torch.multinomial(torch.softmax(logits_K / temperature, dim=-1), 1, generator=generator)])


def _agree(token: int, device: torch.device, source: int) -> int:
    """The token of rank `source`, for all: logits may round differently, and ranks that end apart wait for ever."""
    if dist.get_world_size() == 1:
        return token
    agreed = torch.tensor([token], device=device)
    broadcast(agreed, source)
    return int(agreed)


def sample(
    config: RunConfig, run_dir: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Text from the newest checkpoint of a run, on one device.

    Raises:
        UserError: the run has no checkpoint or no tokenizer.
    """
    if not (run_dir / "tokenizer").is_dir():
        raise UserError(f"{run_dir}/tokenizer is missing\n  remedy: restore the folder that the run wrote at its start")
    tokenizer = load_saved_tokenizer(run_dir / "tokenizer")
    backend, info = resolve(config.backend.name), RankInfo()
    with joined(backend, config.backend, info):
        device = backend.device(0)
        alone = replace(config, parallel=resolve_degrees(ParallelConfig(), 1))
        if lacking_arithmetic(config.precision, backend.capabilities(0)):
            # Asked of a model that was trained elsewhere: its products, by other means.
            alone = replace(alone, precision=replace(config.precision, arithmetic="emulate"))
        built = draft_fitting(alone, backend, info, tokenizer.vocab_size, training=False)
        materialise(built, device, seed=config.train.seed)
        model = built.model
        checkpointer = Checkpointer(run_dir, config.checkpoint, device)
        checkpointer.load(checkpointer.place, model_tensors(model), whole=False)
        whole_bytes = built.count.total * COMPUTE_DTYPES[config.precision.name].itemsize
        if built.need.state_bytes + whole_bytes <= rank_memory_bytes(backend, info):
            # Where there is room, weights are cast to the compute dtype once, not for every token.
            assert isinstance(model, FSDPModule)
            model.set_reshard_after_forward(False)
        return generate(
            model,
            tokenizer,
            prompt,
            tokens=tokens,
            context=config.data.sequence_length,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            device=device,
        )
