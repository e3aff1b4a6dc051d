"""Multi-token prediction: at each position, one more token ahead (DeepSeek-V3, section 2.2).

B sequences, S positions, of them P of this rank (parallel/sequence.py; one rank has all), D hidden width.
"""

import torch
from torch import nn

from octofold.kernels.registry import Kernels
from octofold.train.models.config import ModelConfig
from octofold.train.models.layers import Linear, RMSNorm


class MtpDepth(nn.Module):
    """One depth: what the model knows at a position, joined with the next token, through a layer of its own.

    As in the published weights the embedding comes first in the projection's input (the paper's equation 21 writes it
    second), and the hidden state is taken after the main model's final norm. Embedding and head are the main model's.
    """

    def __init__(self, config: ModelConfig, block: nn.Module, kernels: Kernels) -> None:
        """
        Args:
            block: a decoder layer.
        """
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, kernels)
        self.hnorm = RMSNorm(hidden, eps, kernels)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.block = block
        self.norm = RMSNorm(hidden, eps, kernels)

    def forward(
        self,
        embedded_BPD: torch.Tensor,
        hidden_BPD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        doc_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, P, D] for the head and for the next depth.

        Args:
            embedded_BPD: embeddings of the tokens that the depth before predicts.
            hidden_BPD: what the depth before gave its head.
            rope, doc_ids_BS: as in the layers.
        """
        joined_BPD = self.eh_proj(torch.cat([self.enorm(embedded_BPD), self.hnorm(hidden_BPD)], dim=-1))
        return self.norm(self.block(joined_BPD, rope, doc_ids_BS))
