"""Tiny runs for tests: a model of 8 experts in 4 layers, a corpus made on the spot, and the rules they pass."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from octofold.backends.config import BackendConfig
from octofold.train.checkpoint.validity import checkpoints_of, find_valid, valid_checkpoints
from octofold.train.config import CheckpointConfig, OptimConfig, PrecisionConfig, RunConfig, TrainConfig, validate
from octofold.train.data.config import DataConfig
from octofold.train.models.config import ModelConfig

TINY = ModelConfig(
    name="tiny",
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=192,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)


def write_corpus(root: Path, documents: int = 120) -> Path:
    """Text files of a few hundred bytes in `root/corpus`, the same on every call; returns `root`."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "experts", "idle"]
    choose = random.Random(0)
    (root / "corpus").mkdir(parents=True)
    for number in range(documents):
        text = " ".join(choose.choices(words, k=choose.randint(20, 120)))
        (root / "corpus" / f"{number:03}.txt").write_text(f"{number}: {text}.\n")
    return root


def tiny_run(root: Path, ranks: int = 1, **groups: Any) -> RunConfig:
    """A validated run of `ranks` ranks over the corpus in `root`: FP64, sequences of 64, a batch of 8
    without accumulation, every step logged.

    Args:
        groups: what differs, as a dict for each group (`train={"steps": 20}`), or a value (`resume="…"`).
    """
    config = RunConfig(
        model=TINY,
        data=DataConfig(
            source="text",
            path=str(root / "corpus"),
            sequence_length=64,
            validation_share=0.1,
            cache_dir=str(root / "cache"),
        ),
        precision=PrecisionConfig("fp64"),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(
            steps=3,
            global_batch_size=8,
            micro_batch_size=8 // ranks,
            log_every=1,
            eval_every=0,
            eval_sequences=6,
            sample_tokens=0,
        ),
        # One thread a rank: how a sum is split over threads decides its last bits.
        backend=BackendConfig(name="cpu", threads=1),
        checkpoint=CheckpointConfig(every_steps=1000, retry_s=0.0),
    )
    for name, values in groups.items():
        value = replace(getattr(config, name), **values) if isinstance(values, dict) else values
        config = replace(config, **{name: value})
    return validate(config, ranks)


def newest(where: Path) -> Path:
    """The newest valid checkpoint of a run."""
    return Path(str(find_valid(where).path))


def steps_of(run_dir: Path) -> list[int]:
    """Steps of a run's valid checkpoints, in order."""
    return list(valid_checkpoints(checkpoints_of(run_dir))[0])


def overrides(config: RunConfig) -> list[str]:
    """The command line's `key=value` texts that compose to `config`."""
    return list(_overrides("", asdict(config)))


def _overrides(prefix: str, tree: dict[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _overrides(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}={json.dumps(value)}"
