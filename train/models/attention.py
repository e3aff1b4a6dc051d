"""Multi-head latent attention (DeepSeek-V2, section 2.1), in the expanded form that training uses.

B sequences, S positions, D hidden width, H heads, n and r widths of the parts of a head without and with position,
d = n + r, v width of a value, c rank of the latent that keys and values are expanded from.
"""

import torch
from torch import nn

from octofold.kernels.registry import Kernels
from octofold.train.models.config import ModelConfig
from octofold.train.models.layers import RMSNorm, rotate


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent of width c; one rotary key is shared by all heads."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        heads, d = config.num_attention_heads, config.qk_head_dim
        hidden, rank, eps = config.hidden_size, config.kv_lora_rank, config.rms_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * d, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, kernels)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * d, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(rank, eps, kernels)
        self.kv_b_proj = nn.Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def _queries(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BSD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))

    def forward(
        self,
        x_BSD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        doc_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, S, D] to [B, S, D].

        Args:
            rope: cosine and sine tables from `rope_tables`.
            doc_ids_BS: given, a token attends inside its own document only.
        """
        c = self.config
        B, S, _ = x_BSD.shape
        H, n, r, v = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        q_BSHn, q_BSHr = self._queries(x_BSD).view(B, S, H, n + r).split([n, r], dim=-1)
        latent_BSc, k_BSr = self.kv_a_proj_with_mqa(x_BSD).split([c.kv_lora_rank, r], dim=-1)
        k_BSHn, v_BSHv = self.kv_b_proj(self.kv_a_layernorm(latent_BSc)).view(B, S, H, n + v).split([n, v], dim=-1)
        k_BSHr = rotate(k_BSr[:, :, None], *rope).expand(B, S, H, r)
        q_BHSd = torch.cat([q_BSHn.transpose(1, 2), rotate(q_BSHr, *rope).transpose(1, 2)], dim=-1)
        k_BHSd = torch.cat([k_BSHn.transpose(1, 2), k_BSHr.transpose(1, 2)], dim=-1)
        out_BHSv = self.kernels.attention(
            q_BHSd, k_BHSd, v_BSHv.transpose(1, 2), scale=c.qk_head_dim**-0.5, doc_ids_BS=doc_ids_BS
        )
        return self.o_proj(out_BHSv.transpose(1, 2).reshape(B, S, H * v))
