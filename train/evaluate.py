"""Validation loss over a fixed set of sequences, split over the data ranks."""

from collections.abc import Iterable

import torch
from torch import nn

from octofold.backends.collectives import all_reduce_sum
from octofold.parallel.data import let_go
from octofold.parallel.mesh import Meshes
from octofold.parallel.pipeline import Pipeline
from octofold.train.data.batch import Batch
from octofold.train.loss import summed_cross_entropy, valid_tokens


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    meshes: Meshes,
    *,
    pipeline: Pipeline | None = None,
    mask_documents: bool,
    device: torch.device,
) -> tuple[float, int]:
    """Mean nats a token over all ranks' batches, and the tokens counted. Collective; leaves the model in training mode.

    Args:
        batches: the same number on every rank.
        pipeline: runs the model where it stands on several ranks.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        own = batch.at_context(meshes.rank("context"), meshes.size("context"))
        documents = batch.doc_ids_BS if mask_documents else None
        if pipeline is None:
            logits = model(own.tokens_BS, own.positions_BS, documents)
        else:
            logits = pipeline.forward(own.tokens_BS, positions_BQ=own.positions_BS, doc_ids_BS=documents)
            if logits is None:
                continue
        nats = summed_cross_entropy(logits, own.labels_BS, meshes.dense.get_group("tensor"))
        if meshes.rank("tensor") == 0:
            totals[0] += nats
            totals[1] += valid_tokens(own.labels_BS)
    model.train()
    let_go(model)
    nats, tokens = all_reduce_sum(totals).tolist()
    return nats / max(tokens, 1), int(tokens)
