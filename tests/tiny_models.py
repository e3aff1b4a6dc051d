"""A model of a few thousand numbers, unsplit and on the CPU, and token batches for it, the same on every call."""

import torch

from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import Kernels, Workload, choose
from octofold.train.loss import IGNORED
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder
from octofold.train.models.init import initialise

SMALL = ModelConfig(
    name="small",
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=40,
    # Large enough for logits of size 1, so that a mistake shows.
    initializer_range=0.2,
    num_attention_heads=2,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
)


def kernels_for(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """The providers that `auto` chooses on a CPU."""
    workload = Workload("cpu", dtype, (config.hidden_size, config.moe_intermediate_size))
    return choose(KernelsConfig(), workload)[0]


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Decoder:
    """An initialised model that is not split."""
    model = Decoder(config, kernels_for(config, dtype)).to(dtype)
    initialise(model, seed=seed, std=config.initializer_range, stacked=model.plan().experts)
    return model


def tokens_of(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, length), generator=generator)


def positions_of(tokens_BS: torch.Tensor) -> torch.Tensor:
    """0, 1, … along each sequence."""
    return torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)


def labels_of(tokens_BS: torch.Tensor) -> torch.Tensor:
    """Next tokens; sequence i counts all but i of its labels, so that no two count alike."""
    labels_BS = tokens_BS.roll(-1, dims=1)
    for sequence, labels_S in enumerate(labels_BS):
        labels_S[labels_S.shape[0] - sequence :] = IGNORED
    return labels_BS
