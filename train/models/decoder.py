"""The decoder: embedding, layers of attention and feed-forward networks with residuals, final norm and head.

Parameter names are those that transformers gives DeepSeek-V3 in memory, less the prefix `model.`.
B sequences, S positions, D hidden width, V vocabulary.
"""

import torch
from torch import nn

from octofold.kernels.registry import Kernels
from octofold.parallel.plan import ParallelPlan
from octofold.train.models.attention import LatentAttention
from octofold.train.models.config import ModelConfig
from octofold.train.models.layers import FeedForward, RMSNorm, rope_tables
from octofold.train.models.moe import MixtureOfExperts, SigmoidGate


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = LatentAttention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp: nn.Module
        if layer < config.first_k_dense_replace:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, kernels)
        else:
            self.mlp = MixtureOfExperts(config, kernels)

    def forward(
        self, x_BSD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], doc_ids_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S, D] to [B, S, D]."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, doc_ids_BS)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Decoder(nn.Module):
    """A causal language model. Derive from it, or from its layer, for another architecture (docs/extending.md)."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """`config.vocab_size` must be set; parameters are empty (train/models/init.py fills them)."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i, kernels) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, doc_ids_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, V] in the compute dtype.

        Args:
            tokens_BS: int64.
            positions_BS: int64, for the rotary embedding.
            doc_ids_BS: int64; given, a token attends inside its own document only.
        """
        rope = rope_tables(positions_BS, self.config.qk_rope_head_dim, self.config.rope_theta)
        x_BSD = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, rope, doc_ids_BS)
        return self.lm_head(self.norm(x_BSD))

    def plan(self) -> ParallelPlan:
        """What parallel/ needs to know."""
        moe_layers = [i for i in range(len(self.layers)) if i >= self.config.first_k_dense_replace]
        return ParallelPlan(
            blocks=tuple(f"layers.{i}" for i in range(len(self.layers))),
            experts=tuple(f"layers.{i}.mlp.experts" for i in moe_layers),
        )

    def gates(self) -> dict[int, SigmoidGate]:
        """The gate of each MoE layer, by layer number."""
        return {i: layer.mlp.gate for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MixtureOfExperts)}
