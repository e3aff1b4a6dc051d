"""What the ranks of a pipeline do in tests. Every function runs on every rank."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import SMALL, decoder, labels_of, positions_of, tokens_of

from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline import Pipeline
from octofold.parallel.pipeline_split import rank_of_stage, split_layers
from octofold.train.loss import summed_cross_entropy
from octofold.train.models.config import ModelConfig

SEQUENCES, LENGTH = 2, 9


def deep(layers: int, depths: int) -> ModelConfig:
    """A small model with that many layers and depths of multi-token prediction."""
    return replace(SMALL, num_hidden_layers=layers, num_nextn_predict_layers=depths)


def loss_of(predicted: Sequence[torch.Tensor], labels_BJS: torch.Tensor) -> torch.Tensor:
    """Summed over the kinds of loss."""
    sums = [summed_cross_entropy(x, y) for x, y in zip(predicted, labels_BJS.unbind(1), strict=True)]
    return torch.stack(sums).sum()


def unsharded(schedule: str, model: ModelConfig, micro_batches: int, steps: int) -> dict[str, Any]:
    """Stages that nothing else splits: gradients by name and, from the last stage, logits of a forward pass."""
    config = ParallelConfig(pipeline=dist.get_world_size(), data_shard=1, pipeline_schedule=schedule)
    depths, whole = model.num_nextn_predict_layers, decoder(model)
    parts = split_layers(config, model.num_hidden_layers, depths)
    mine = [stage for stage, rank in enumerate(rank_of_stage(config)) if rank == dist.get_rank()]
    stages = {stage: whole.stage(parts[stage]) for stage in mine}
    stream = torch.empty(SEQUENCES, LENGTH, model.hidden_size, dtype=torch.float64, device="meta")
    assert dist.group.WORLD is not None
    pipeline = Pipeline(
        stages,
        config,
        dist.group.WORLD,
        micro_batches=micro_batches,
        stream_BPD=stream,
        outputs=1 + depths,
        device=torch.device("cpu"),
    )
    tokens, labels, ahead = batch_of(model, micro_batches)
    for _ in range(steps):
        pipeline.accumulate(tokens, labels, loss_of, positions_BQ=positions_of(tokens), ahead=ahead)
    logits = pipeline.forward(tokens[:1, :5], positions_BQ=positions_of(tokens[:1, :5]))
    assert (logits is not None) == pipeline.holds_last
    named = [item for stage in stages.values() for item in stage.named_parameters()]
    return {"gradients": [(name, p.grad) for name, p in named], "logits": logits}


def batch_of(model: ModelConfig, micro_batches: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Tokens, labels [B, J, S] and the tokens ahead, of all micro-batches."""
    tokens, depths = tokens_of(model, micro_batches * SEQUENCES, LENGTH), model.num_nextn_predict_layers
    ahead = [tokens.roll(-depth - 1, 1) for depth in range(depths)]
    return tokens, torch.stack([labels_of(tokens)] * (1 + depths), dim=1), ahead
