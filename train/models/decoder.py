"""The decoder: embedding, layers of attention and feed-forward networks with residuals, final norm and head.

What a layer is made of is looked up by the kinds that the configuration gives it. Parameter names are those that
transformers gives DeepSeek-V2 and V3 in memory, less the prefix `model.`.
B sequences, S positions, D hidden width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import nn

from octofold.kernels.registry import Kernels
from octofold.parallel.plan import ParallelPlan
from octofold.train.models.attention import LatentAttention, LatentCache
from octofold.train.models.config import ModelConfig
from octofold.train.models.gate import TopKGate
from octofold.train.models.layers import Embedding, FeedForward, Linear, RMSNorm, SumResidual
from octofold.train.models.moe import MixtureOfExperts
from octofold.train.models.mtp import MtpDepth
from octofold.train.models.rope import rope_tables

ATTENTIONS = {"latent": LatentAttention}
"""By `ModelConfig.attention_kind`."""
RESIDUALS = {"sum": SumResidual}
"""By `ModelConfig.residual_kind`."""


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward network or experts, each behind a norm and joined to the stream."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.residual = RESIDUALS[config.residual_kind]()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = ATTENTIONS[config.attention_kind(layer)](config, layer, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp: nn.Module
        if config.mlp_kind(layer) == "dense":
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, kernels)
        else:
            self.mlp = MixtureOfExperts(config, layer, kernels)

    def forward(
        self,
        stream: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        doc_ids_BS: torch.Tensor | None,
        cache: LatentCache | None = None,
    ) -> torch.Tensor:
        """The residual stream ([B, S, D] in the plain kind) after this layer; arguments as in the attention."""
        stream = self.residual.join(stream, lambda x: self.self_attn(self.input_layernorm(x), rope, doc_ids_BS, cache))
        return self.residual.join(stream, lambda x: self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """A causal language model. Derive from it, or from its layer, for another architecture (docs/extending.md)."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """`config.vocab_size` must be set; parameters are empty (train/models/init.py fills them)."""
        super().__init__()
        self.config = config
        layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.residual = RESIDUALS[config.residual_kind]()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i, kernels) for i in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MtpDepth(config, self.layer_class(config, layers + depth, kernels), kernels) for depth in range(depths)
        )

    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Embeddings, [B, S, D]. A model with further inputs overrides this."""
        return self.embed_tokens(tokens_BS)

    @overload
    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        cache: LatentCache | None = None,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        ahead: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]: ...

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        cache: LatentCache | None = None,
        ahead: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Logits [B, S, V] in the compute dtype; with `ahead`, a list of them: the next token's, then each depth's.

        Args:
            tokens_BS: int64.
            positions_BS: int64, for the rotary embedding.
            doc_ids_BS: int64; given, a token attends inside its own document only.
            cache: given, the tokens follow those in the cache and are added to it.
            ahead: one int64 [B, S] for each depth of multi-token prediction: the tokens 1, 2, … places further on.
        """
        x_BSD = self.embed(tokens_BS)
        rope = rope_tables(positions_BS, self.config, x_BSD.dtype)
        stream = self.residual.begin(x_BSD)
        for layer in self.layers:
            stream = layer(stream, rope, doc_ids_BS, cache)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        hidden_BSD = self.norm(self.residual.end(stream))
        logits_BSV = self.lm_head(hidden_BSD)
        if ahead is None:
            return logits_BSV
        predicted = [logits_BSV]
        for depth, next_BS in zip(self.mtp, ahead, strict=True):
            hidden_BSD = depth(self.embed(next_BS), hidden_BSD, rope, doc_ids_BS)
            predicted.append(self.lm_head(hidden_BSD))
        return predicted

    def _numbered_layers(self) -> Iterator[tuple[int, str, DecoderLayer]]:
        """(number, name, layer) of every layer, those of multi-token prediction last."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield number, f"layers.{number}", layer
        for number, depth in enumerate(self.mtp):
            assert isinstance(depth, MtpDepth)
            assert isinstance(depth.block, DecoderLayer)
            yield len(self.layers) + number, f"mtp.{number}.block", depth.block

    def plan(self) -> ParallelPlan:
        """What parallel/ needs to know."""
        blocks = [f"layers.{i}" for i in range(len(self.layers))] + [f"mtp.{i}" for i in range(len(self.mtp))]
        experts = [
            f"{name}.mlp.experts"
            for _, name, layer in self._numbered_layers()
            if isinstance(layer.mlp, MixtureOfExperts)
        ]
        return ParallelPlan(blocks=tuple(blocks), experts=tuple(experts))

    def gates(self) -> dict[int, TopKGate]:
        """The gate of each layer with experts, by layer number."""
        return {
            number: layer.mlp.gate
            for number, _, layer in self._numbered_layers()
            if isinstance(layer.mlp, MixtureOfExperts)
        }
