"""transformers' DeepSeek-V2 and V3 as oracles: peers of our dimensions with fresh weights, and our model with those."""

from functools import cache
from typing import Any

import torch
from tiny_models import kernels_for

from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder

SHARED = "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size rms_norm_eps "
SHARED += (
    "tie_word_embeddings num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
)
SHARED += (
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group norm_topk_prob "
)
SHARED += "routed_scaling_factor"


@cache
def library() -> Any:
    """Loaded by the first test that needs it: it takes seconds."""
    import transformers

    return transformers


def peer_of(config: ModelConfig, seed: int) -> Any:
    """The library's model of the same dimensions (by gate V2's or V3's) with fresh weights, norms and biases too."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    longest = 2048
    if config.rope_scaling.type == "yarn":
        longest = int(config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings)
        rope |= {**vars(config.rope_scaling), "rope_type": "yarn"}
        del rope["type"]
    family = "V2" if config.scoring_func == "softmax" else "V3"
    only_one = (
        {"topk_method": config.topk_method} if family == "V2" else {"num_mtp_layers": config.num_nextn_predict_layers}
    )
    peer_config = getattr(library(), f"Deepseek{family}Config")(
        **{name: getattr(config, name) for name in SHARED.split()},
        **only_one,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=longest,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    peer = getattr(library(), f"Deepseek{family}ForCausalLM")(peer_config).train()
    refill(peer, config, seed)
    return peer


def mtp_peer_of(peer: Any, config: ModelConfig, seed: int) -> Any:
    """The library's multi-token prediction on top of `peer`, with fresh weights."""
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(peer, config.num_nextn_predict_layers).train()
    refill(mtp.layers, config, seed + 1000)
    return mtp


def refill(module: Any, config: ModelConfig, seed: int) -> None:
    """Every parameter and buffer at random: norms around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            spread = 0.1 if "norm" in name else config.initializer_range
            tensor.normal_(float("norm" in name), spread, generator=generator)


def our_name(name: str) -> str:
    """What we call a parameter of the library's model or of its `MtpModel.layers` (given as mtp.N…)."""
    return name.removeprefix("model.").replace(".mtp_block.", ".block.").replace(".post_norm.", ".norm.")


def named(peer: Any, mtp: Any = None) -> dict[str, torch.nn.Parameter]:
    """The library's parameters under our names; those of shared experts of width 0 are left out."""
    pairs = [*peer.named_parameters()]
    if mtp is not None:
        pairs += [(f"mtp.{name}", parameter) for name, parameter in mtp.layers.named_parameters()]
    return {our_name(name): parameter for name, parameter in pairs if parameter.numel()}


def ours_from(peer: Any, config: ModelConfig, mtp: Any = None) -> Decoder:
    """Our model with the library's weights."""
    model = Decoder(config, kernels_for(config, torch.float32))
    state = peer.state_dict()
    if mtp is not None:
        state |= {f"mtp.{name}": tensor for name, tensor in mtp.layers.state_dict().items()}
    held = model.state_dict()
    renamed = {our_name(name): tensor for name, tensor in state.items() if tensor.numel()}
    # Gate and up are one dim there, two here, in the same order.
    model.load_state_dict({name: tensor.view(held[name].shape) for name, tensor in renamed.items()})
    return model
