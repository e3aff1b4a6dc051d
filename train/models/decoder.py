"""The decoder: embedding, layers of attention and feed-forward networks with residuals, final norm and head.

What a layer is made of is looked up by the kinds that the configuration gives it. Parameter names are those that
transformers gives DeepSeek-V2 and V3 in memory, less the prefix `model.`.
A stage of a pipeline is a decoder with only some of the layers, under their names in the whole.
B sequences, S positions, of them Q of this context rank and P of this rank (parallel/sequence.py; one rank has all), D
hidden width, V entries of the vocabulary that this rank has logits of.
"""

from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from typing import Self, overload

import torch
from torch import nn

from octofold.kernels.registry import Kernels
from octofold.parallel.plan import ParallelPlan, Part
from octofold.parallel.sequence import WholeSequence
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


COLUMNS = ("embed_tokens", "q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head")
"""Linear layers, by the last part of their name, whose outputs (heads, widths, entries) tensor ranks divide."""
ROWS = ("o_proj", "down_proj")
"""Those that take what such a layer gave."""


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
        """The residual stream ([B, P, D] in the plain kind) after this layer; arguments as in the attention."""
        stream = self.residual.join(stream, lambda x: self.self_attn(self.input_layernorm(x), rope, doc_ids_BS, cache))
        return self.residual.join(stream, lambda x: self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """A causal language model. Derive from it, or from its layer, for another architecture (docs/extending.md)."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """`config.vocab_size` must be set; parameters are empty (train/models/init.py fills them)."""
        super().__init__()
        self.config = config
        self.part = Part(range(config.num_hidden_layers))
        self.sequence = WholeSequence()
        layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.residual = RESIDUALS[config.residual_kind]()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): self.layer_class(config, i, kernels) for i in range(layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MtpDepth(config, self.layer_class(config, layers + depth, kernels), kernels) for depth in range(depths)
        )

    def stage(self, part: Part) -> Self:
        """A decoder of some of this one's layers and, at the ends of the pipeline, what stands beside them.

        It takes over the modules that it keeps. The last stage has an embedding of its own where it needs one (for
        multi-token prediction, or a tied head): a copy, whose gradient is a share of the embedding's.
        """
        stage = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # tables of submodules and hooks, which a shallow copy shares
                setattr(stage, name, copy(value))
        stage.part = part
        stage.layers = nn.ModuleDict({str(i): self.layers[str(i)] for i in part.layers})
        if stage.copies_embedding:
            stage.embed_tokens = deepcopy(self.embed_tokens)
            if self.config.tie_word_embeddings:
                stage.lm_head.weight = stage.embed_tokens.weight
        elif not part.first:
            del stage.embed_tokens
        if not part.last:
            del stage.norm, stage.lm_head
            stage.mtp = nn.ModuleList()
        return stage

    @property
    def embedding_has_a_copy(self) -> bool:
        """Whether the last of several stages holds a copy of the embedding."""
        return bool(self.config.num_nextn_predict_layers) or self.config.tie_word_embeddings

    @property
    def copies_embedding(self) -> bool:
        """Whether the embedding here is that copy; its original is the first stage's."""
        return self.embedding_has_a_copy and self.part.last and not self.part.first

    def embed(self, tokens_BQ: torch.Tensor) -> torch.Tensor:
        """Embeddings, [B, P, D]. A model with further inputs overrides this."""
        return self.embed_tokens(tokens_BQ)

    def logits(self, hidden_BPD: torch.Tensor) -> torch.Tensor:
        """[B, Q, V] in the compute dtype."""
        return self.lm_head(self.sequence.enter(hidden_BPD))

    @overload
    def forward(
        self,
        tokens_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        cache: LatentCache | None = None,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        tokens_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        ahead: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]: ...

    def forward(
        self,
        tokens_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        doc_ids_BS: torch.Tensor | None = None,
        *,
        cache: LatentCache | None = None,
        ahead: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Logits [B, Q, V] in the compute dtype; with `ahead`, a list of them: the next token's, then each depth's.

        A stage that is not the last returns the residual stream.

        Args:
            tokens_BQ: int64; to a stage that is not the first, the residual stream instead.
            positions_BQ: int64, for the rotary embedding.
            doc_ids_BS: int64, of the whole sequence; given, a token attends inside its own document only.
            cache: given, the tokens follow those in the cache and are added to it.
            ahead: one int64 [B, Q] for each depth of multi-token prediction: the tokens 1, 2, … places further on.
        """
        stream = self.residual.begin(self.embed(tokens_BQ)) if self.part.first else tokens_BQ
        rope = rope_tables(positions_BQ, self.config, stream.dtype)
        for layer in self.layers.values():
            stream = layer(stream, rope, doc_ids_BS, cache)
        if cache is not None:
            cache.advance(positions_BQ.shape[1])
        if not self.part.last:
            return stream
        hidden_BPD = self.norm(self.residual.end(stream))
        logits_BQV = self.logits(hidden_BPD)
        if ahead is None:
            return logits_BQV
        predicted = [logits_BQV]
        for depth, next_BQ in zip(self.mtp, ahead, strict=True):
            hidden_BPD = depth(self.embed(next_BQ), hidden_BPD, rope, doc_ids_BS)
            predicted.append(self.logits(hidden_BPD))
        return predicted

    def _numbered_layers(self) -> Iterator[tuple[int, str, DecoderLayer]]:
        """(number, name, layer) of every layer, those of multi-token prediction last."""
        for name, layer in self.layers.items():
            assert isinstance(layer, DecoderLayer)
            yield int(name), f"layers.{name}", layer
        for number, depth in enumerate(self.mtp):
            assert isinstance(depth, MtpDepth)
            assert isinstance(depth.block, DecoderLayer)
            yield self.config.num_hidden_layers + number, f"mtp.{number}.block", depth.block

    def plan(self) -> ParallelPlan:
        """What parallel/ needs to know."""
        blocks = [f"layers.{i}" for i in self.layers] + [f"mtp.{i}" for i in range(len(self.mtp))]
        experts = [
            f"{name}.mlp.experts"
            for _, name, layer in self._numbered_layers()
            if isinstance(layer.mlp, MixtureOfExperts)
        ]
        named = dict(self.named_modules())
        return ParallelPlan(
            blocks=tuple(blocks),
            experts=tuple(experts),
            columns=tuple(name for name in named if name.rpartition(".")[2] in COLUMNS),
            rows=tuple(name for name in named if name.rpartition(".")[2] in ROWS),
            sequences=tuple(name for name, module in named.items() if hasattr(module, "sequence")),
            compiled=tuple(name for name, module in named.items() if isinstance(module, RMSNorm)),
        )

    def gates(self) -> dict[int, TopKGate]:
        """The gate of each layer with experts, by layer number."""
        return {
            number: layer.mlp.gate
            for number, _, layer in self._numbered_layers()
            if isinstance(layer.mlp, MixtureOfExperts)
        }
