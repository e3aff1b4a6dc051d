"""Extremes of routing, around a run on every rank: tasks like `record`, for one rank and for many alike."""

from pathlib import Path
from unittest.mock import patch

import torch

from octofold.train.config import RunConfig
from octofold.train.layout.facts import RankFacts
from octofold.train.layout.record import record
from octofold.train.models.gate import TopKGate


def everything_to_one_expert(config: RunConfig, run_dir: Path) -> RankFacts:
    """Of a model that takes one expert a token."""

    def choose(gate: TopKGate, scores_TE: torch.Tensor) -> torch.Tensor:
        return torch.full((len(scores_TE), 1), 5)

    with patch.object(TopKGate, "_choose", choose):
        return record(config, run_dir)


def most_experts_empty(config: RunConfig, run_dir: Path) -> RankFacts:
    """Tokens choose among the last group of experts, so that all others, and the ranks that hold them, get none."""

    def choose(gate: TopKGate, scores_TE: torch.Tensor) -> torch.Tensor:
        count, K = gate.config.n_routed_experts // gate.config.n_group, gate.config.num_experts_per_tok
        return scores_TE[:, -count:].topk(K, dim=1).indices + scores_TE.shape[1] - count

    with patch.object(TopKGate, "_choose", choose):
        return record(config, run_dir)
