"""Extremes of routing and of labels, around a run on every rank: tasks like `record`, for one rank and many alike."""

from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from octofold.train.config import RunConfig
from octofold.train.data.batch import IGNORED_LABEL, Batch
from octofold.train.data.loader import Loader
from octofold.train.layout.facts import RankFacts
from octofold.train.layout.record import record
from octofold.train.models.gate import TopKGate


def everything_to_one_expert(config: RunConfig, run_dir: Path) -> RankFacts:
    """Of a model that takes one expert a token."""

    usual = TopKGate._choose

    def choose(gate: TopKGate, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return usual(gate, logits_TE)[0], torch.full((len(logits_TE), 1), 5)

    with patch.object(TopKGate, "_choose", choose):
        return record(config, run_dir)


def most_experts_empty(config: RunConfig, run_dir: Path) -> RankFacts:
    """Tokens choose among the last group of experts, so that all others, and the ranks that hold them, get none."""

    usual = TopKGate._choose

    def choose(gate: TopKGate, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = usual(gate, logits_TE)[0]
        count, K = gate.config.n_routed_experts // gate.config.n_group, gate.config.num_experts_per_tok
        return scores_TE, scores_TE.detach()[:, -count:].topk(K, dim=1).indices + scores_TE.shape[1] - count

    with patch.object(TopKGate, "_choose", choose):
        return record(config, run_dir)


def unequal_counts(config: RunConfig, run_dir: Path) -> RankFacts:
    """As it is; of many ranks, some must read more labels that count than others in some step."""
    facts = record(config, run_dir)
    least, most = _extremes(facts)
    assert dist.get_world_size() == 1 or (least < most).any()
    return facts


def a_rank_without_labels(config: RunConfig, run_dir: Path) -> RankFacts:
    """No label counts in every fourth sequence: in all that the first of four data ranks reads."""
    next_step = Loader.next_step

    def masked(loader: Loader) -> list[Batch]:
        batches = next_step(loader)
        for number, batch in enumerate(batches):
            first = (number * loader._ranks + loader._rank) * loader._micro
            samples_B = torch.arange(first, first + len(batch.labels_BS))
            batch.labels_BS[samples_B % 4 == 0] = IGNORED_LABEL
        return batches

    with patch.object(Loader, "next_step", masked):
        facts = record(config, run_dir)
    least, most = _extremes(facts)
    assert dist.get_world_size() == 1 or not least.any()
    assert most.all()
    return facts


def _extremes(facts: RankFacts) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest and the most labels that count in what a rank reads, by step. Collective."""
    least = torch.tensor([step.own_tokens for step in facts.steps])
    most = least.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return least, most
