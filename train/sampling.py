"""Text from a model: one token at a time, from the full forward pass."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from octofold.backends.errors import UserError
from octofold.backends.process_group import RankInfo, joined
from octofold.backends.registry import resolve
from octofold.parallel.config import ParallelConfig
from octofold.parallel.config import resolve as resolve_degrees
from octofold.train.build import build_model
from octofold.train.checkpoint.manager import Checkpointer, find
from octofold.train.config import RunConfig
from octofold.train.data.tokenizer import Tokenizer, load_saved_tokenizer
from octofold.train.engines.native import model_tensors

WINDOW_MULTIPLE = 64


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    context: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device,
) -> str:
    """The prompt continued by up to `tokens` tokens; ends early at the tokenizer's end-of-text.

    Collective: every rank passes the same arguments and draws the same tokens. Leaves the model in training mode.

    Args:
        context: the model sees at most this many tokens back.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0: among all.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]
    model.eval()
    for _ in range(tokens):
        window = ids[-context:]
        # Padding behind a token does not change what it sees, and keeps the shapes few (libraries compile for each).
        padding = [tokenizer.eos_id] * (-len(window) % WINDOW_MULTIPLE)
        tokens_1S = torch.tensor([window + padding], device=device)
        positions_1S = torch.arange(tokens_1S.shape[1], device=device)[None]
        logits_V = model(tokens_1S, positions_1S)[0, len(window) - 1, : tokenizer.vocab_size]
        logits = logits_V.double().cpu()
        chosen = _agree(_draw(logits, temperature, top_k, generator), device)
        if chosen == tokenizer.eos_id:
            break
        ids.append(chosen)
    model.train()
    return tokenizer.decode(ids)


def _draw(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not torch.isfinite(logits_V).all():
        raise UserError(
            "the model's logits are not finite\n  remedy: sample from an earlier checkpoint (RUN/checkpoints)"
        )
    kept = 1 if temperature == 0 else min(top_k or len(logits_V), len(logits_V))
    logits_K, ids_K = logits_V.topk(kept)
    if kept == 1:
        return int(ids_K)
    return int(ids_K[torch.multinomial(torch.softmax(logits_K / temperature, dim=-1), 1, generator=generator)])


def _agree(token: int, device: torch.device) -> int:
    """Rank 0's token: logits may round differently between ranks, and ranks that end apart would wait for ever."""
    agreed = torch.tensor([token], device=device)
    dist.broadcast(agreed, src=0)
    return int(agreed)


def sample(
    config: RunConfig, run_dir: Path, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Text from the newest checkpoint of a run, on one device.

    Raises:
        UserError: the run has no checkpoint or no tokenizer.
    """
    checkpoint = find(run_dir)
    if not (run_dir / "tokenizer").is_dir():
        raise UserError(f"{run_dir}/tokenizer is missing\n  remedy: restore the folder that the run wrote at its start")
    tokenizer = load_saved_tokenizer(run_dir / "tokenizer")
    backend, info = resolve(config.backend.name), RankInfo()
    with joined(backend, config.backend, info):
        device = backend.device(0)
        alone = resolve_degrees(ParallelConfig(), 1)
        model = build_model(replace(config, parallel=alone), device, tokenizer.vocab_size).model
        Checkpointer(run_dir, config.checkpoint, device).load(checkpoint, model_tensors(model), whole=False)
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
