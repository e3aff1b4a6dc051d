"""Multi-head latent attention (DeepSeek-V2, section 2.1), expanded for training and absorbed for generation.

B sequences, S positions, of them Q of this context rank and P of this rank (parallel/sequence.py; one rank has all), C
cached positions, D hidden width, H heads (those of this rank), n and r widths of the parts of a head without and with
position, d = n + r, v width of a value, l rank of the latent that keys and values are expanded from.
"""

from functools import partial

import torch
from torch import nn

from octofold.kernels.recompute import recomputed
from octofold.kernels.registry import Kernels
from octofold.parallel.apply import local
from octofold.parallel.sequence import WholeSequence
from octofold.train.models.config import ModelConfig
from octofold.train.models.layers import Linear, RMSNorm
from octofold.train.models.rope import softmax_scale

LATENT_NORM_EPS = 1e-6
"""The published models norm their latents with this, whatever `rms_norm_eps` says."""


class LatentCache:
    """What absorbed attention keeps of past tokens: l + r numbers a token and layer, shared by all heads."""

    def __init__(self, layers: int, capacity: int) -> None:
        """
        Args:
            capacity: tokens that a sequence may come to.
        """
        self.capacity = capacity
        self.length = 0
        """Tokens that every layer has seen."""
        self._kept_BCw: list[torch.Tensor | None] = [None] * layers

    @property
    def size_bytes(self) -> int:
        """What the cache takes, filled or not."""
        return sum(kept.nbytes for kept in self._kept_BCw if kept is not None)

    def extend(self, layer: int, new_BSw: torch.Tensor) -> torch.Tensor:
        """Append a layer's new tokens; returns all of that layer's, [B, length + S, l + r]."""
        sequences, tokens, width = new_BSw.shape
        end = self.length + tokens
        assert end <= self.capacity, "the cache is full"
        kept_BCw = self._kept_BCw[layer]
        if kept_BCw is None:
            kept_BCw = self._kept_BCw[layer] = new_BSw.new_empty(sequences, self.capacity, width)
        kept_BCw[:, self.length : end] = new_BSw
        return kept_BCw[:, :end]

    def advance(self, tokens: int) -> None:
        """Every layer has appended so many tokens."""
        self.length += tokens


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent of width l; one rotary key is shared by all heads.

    So what ranks send each other of the positions they hold is that latent and that key, l + r numbers a token, and not
    the keys and values of every head.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels
        self.scale = softmax_scale(config)
        self.sequence = WholeSequence()
        heads, d = config.num_attention_heads, config.qk_head_dim
        hidden, rank = config.hidden_size, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * d)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, kernels)
            self.q_b_proj = Linear(config.q_lora_rank, heads * d)
        self.kv_a_proj_with_mqa = Linear(hidden, rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS, kernels)
        self.kv_b_proj = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def forward(
        self,
        x_BPD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        doc_ids_BS: torch.Tensor | None,
        cache: LatentCache | None = None,
    ) -> torch.Tensor:
        """[B, P, D] to [B, P, D].

        Args:
            rope: cosine and sine tables from `rope_tables`, of Q positions.
            doc_ids_BS: of the whole sequence; given, a token attends inside its own document only.
            cache: given, the tokens follow those in the cache and are added to it. What follows others is computed in
                the absorbed form; what begins a sequence is expanded, since many tokens make it the cheaper form.
        """
        c = self.config
        q_BHQd = self._queries(x_BPD, rope)
        latent_BPl, k_BPr = self.kv_a_proj_with_mqa(x_BPD).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        own_rope = [self.sequence.own(table) for table in rope]
        latent_BPl, k_BPr = self.kv_a_layernorm(latent_BPl), self.kernels.rotary(k_BPr[:, :, None], *own_rope)[:, :, 0]
        new_BSw = self.sequence.everyone(torch.cat([latent_BPl, k_BPr], dim=-1))
        kept_BCw = None
        if cache is not None:
            assert doc_ids_BS is None, "the cache holds one document a sequence"
            kept_BCw = cache.extend(self.layer, new_BSw)
        if kept_BCw is None or kept_BCw.shape[1] == new_BSw.shape[1]:
            out_BQHv = self._expanded(q_BHQd, new_BSw, doc_ids_BS)
        else:
            out_BQHv = self._absorbed(q_BHQd, kept_BCw)
        return self.sequence.leave(self.o_proj(out_BQHv.flatten(2)))

    def _queries(self, x_BPD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if self.config.q_lora_rank is None:
            return self._query_heads(self.q_proj, self.sequence.enter(x_BPD), *rope)
        latent_BQl = self.sequence.enter(self.q_a_layernorm(self.q_a_proj(x_BPD)))
        return recomputed("up_projection", partial(self._query_heads, self.q_b_proj), latent_BQl, *rope)

    def _query_heads(
        self, project: nn.Module, x_BQw: torch.Tensor, cos_BQc: torch.Tensor, sin_BQc: torch.Tensor
    ) -> torch.Tensor:
        c = self.config
        q_BQHd = project(x_BQw).unflatten(-1, (-1, c.qk_head_dim))
        q_BQHn, q_BQHr = q_BQHd.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        turned_BQHr = self.kernels.rotary(q_BQHr, cos_BQc, sin_BQc)
        # Transposed before they are joined, which saves a copy: attention wants heads before positions.
        return torch.cat([q_BQHn.transpose(1, 2), turned_BQHr.transpose(1, 2)], dim=-1)

    def _key_value_heads(self, new_BSw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, S, d] and values [B, H, S, v], expanded from latents and rotary keys."""
        c = self.config
        latent_BSl, k_BSr = new_BSw.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv_BSHw = self.kv_b_proj(latent_BSl).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        k_BSHn, v_BSHv = kv_BSHw.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_BSHr = k_BSr[:, :, None].expand(*k_BSHn.shape[:-1], -1)
        return torch.cat([k_BSHn.transpose(1, 2), k_BSHr.transpose(1, 2)], dim=-1), v_BSHv.transpose(1, 2)

    def _expanded(self, q_BHQd: torch.Tensor, new_BSw: torch.Tensor, doc_ids_BS: torch.Tensor | None) -> torch.Tensor:
        """Attention over keys and values of every head: [B, Q, H, v]."""
        k_BHSd, v_BHSv = recomputed("up_projection", self._key_value_heads, new_BSw)
        out_BHQv = self.sequence.attend(
            self.kernels.attention, q_BHQd, k_BHSd, v_BHSv, scale=self.scale, doc_ids_BS=doc_ids_BS
        )
        return out_BHQv.transpose(1, 2)

    def _absorbed(self, q_BHSd: torch.Tensor, kept_BCw: torch.Tensor) -> torch.Tensor:
        """The same, with the expansion moved to the queries and the output: [B, S, H, v].

        k = W_UK latent and v = W_UV latent, so q·k = (W_UKᵀ q)·latent and Σ p v = W_UV (Σ p latent): every head reads
        the cached latents as they are (DeepSeek-V2, section 2.1.2).
        """
        c, (sequences, heads, new, _), kept = self.config, q_BHSd.shape, kept_BCw.shape[1]
        q_BSHn, q_BSHr = q_BHSd.transpose(1, 2).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        weight_Hwl = local(self.kv_b_proj.weight).unflatten(0, (heads, -1))
        up_k_Hnl, up_v_Hvl = weight_Hwl.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_BSHw = torch.cat([torch.einsum("bshn,hnl->bshl", q_BSHn, up_k_Hnl), q_BSHr], dim=-1)
        # One key for all heads, so positions and heads are rows of one product.
        scores_BSHC = self.scale * (q_BSHw.flatten(1, 2) @ kept_BCw.mT).view(sequences, new, heads, kept)
        if new > 1:  # a single new token sees all
            hidden_SC = torch.ones(new, kept, dtype=torch.bool, device=kept_BCw.device).triu(kept - new + 1)
            scores_BSHC = scores_BSHC.masked_fill(hidden_SC[:, None], float("-inf"))
        exact = torch.float64 if scores_BSHC.dtype == torch.float64 else torch.float32
        weights_BSHC = scores_BSHC.softmax(-1, dtype=exact).to(kept_BCw.dtype)
        seen_BNl = weights_BSHC.flatten(1, 2) @ kept_BCw[..., : c.kv_lora_rank]
        return torch.einsum("bshl,hvl->bshv", seen_BNl.view(sequences, new, heads, -1), up_v_Hvl)
