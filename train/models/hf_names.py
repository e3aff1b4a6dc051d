"""The tensors of a model in a Hugging Face checkpoint, and where each lies in ours. Torch-free.

Our stacked experts hold gate, then up, expert by expert; so each published tensor is a matrix of one of ours, and ours
is the published ones, in the order of `hf_tensors`, one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from octofold.train.models.config import ModelConfig


@dataclass(frozen=True)
class HfTensor:
    """A published tensor."""

    name: str
    shape: tuple[int, ...]
    ours: str
    """The parameter or buffer of our model that holds it."""
    place: tuple[int, ...] = ()
    """Where it stands along the leading dims of ours: (expert,), or (expert, 0 or 1) for gate and up."""
    quantised: bool = False
    """FP8 checkpoints hold it in FP8: a linear layer's weight, but for gate, head and the projection of MTP."""
    exact: bool = False
    """Kept in FP32 whatever the checkpoint's precision: the expert bias."""
    copy: bool = False
    """A repetition for readers that want one; it is checked on import and holds nothing of its own."""


def hf_tensors(config: ModelConfig) -> Iterator[HfTensor]:
    """Every tensor that a checkpoint of the model holds; `config.vocab_size` must be set."""
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = HfTensor("model.embed_tokens.weight", vocabulary, "embed_tokens.weight")
    head = HfTensor("lm_head.weight", vocabulary, "lm_head.weight")
    if config.tie_word_embeddings:
        head = replace(head, ours="embed_tokens.weight", copy=True)
    yield head
    yield embedding
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, f"layers.{layer}")
    yield HfTensor("model.norm.weight", (config.hidden_size,), "norm.weight")
    for depth in range(config.num_nextn_predict_layers):
        number, ours = config.num_hidden_layers + depth, f"mtp.{depth}"
        prefix, hidden = f"model.layers.{number}", config.hidden_size
        yield HfTensor(f"{prefix}.enorm.weight", (hidden,), f"{ours}.enorm.weight")
        yield HfTensor(f"{prefix}.hnorm.weight", (hidden,), f"{ours}.hnorm.weight")
        yield HfTensor(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), f"{ours}.eh_proj.weight")
        yield from _layer(config, number, f"{ours}.block")
        yield HfTensor(f"{prefix}.shared_head.norm.weight", (hidden,), f"{ours}.norm.weight")
        yield replace(embedding, name=f"{prefix}.embed_tokens.weight", copy=True)
        yield replace(head, name=f"{prefix}.shared_head.head.weight", copy=True)


def _layer(config: ModelConfig, number: int, ours: str) -> Iterator[HfTensor]:
    def norm(name: str, width: int) -> HfTensor:
        return HfTensor(f"model.layers.{number}.{name}.weight", (width,), f"{ours}.{name}.weight")

    def linear(name: str, out: int, into: int) -> HfTensor:
        shape = (out, into)
        return HfTensor(f"model.layers.{number}.{name}.weight", shape, f"{ours}.{name}.weight", quantised=True)

    hidden, heads, c = config.hidden_size, config.num_attention_heads, config
    yield norm("input_layernorm", hidden)
    if c.q_lora_rank is None:
        yield linear("self_attn.q_proj", heads * c.qk_head_dim, hidden)
    else:
        yield linear("self_attn.q_a_proj", c.q_lora_rank, hidden)
        yield norm("self_attn.q_a_layernorm", c.q_lora_rank)
        yield linear("self_attn.q_b_proj", heads * c.qk_head_dim, c.q_lora_rank)
    yield linear("self_attn.kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, hidden)
    yield norm("self_attn.kv_a_layernorm", c.kv_lora_rank)
    yield linear("self_attn.kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield linear("self_attn.o_proj", hidden, heads * c.v_head_dim)
    yield norm("post_attention_layernorm", hidden)
    if c.mlp_kind(number) == "dense":
        width, shared = c.intermediate_size, "mlp"
    else:
        width, shared = c.n_shared_experts * c.moe_intermediate_size, "mlp.shared_experts"
        yield from _routed(config, number, ours)
    if width:
        yield linear(f"{shared}.gate_proj", width, hidden)
        yield linear(f"{shared}.up_proj", width, hidden)
        yield linear(f"{shared}.down_proj", hidden, width)


def _routed(config: ModelConfig, number: int, ours: str) -> Iterator[HfTensor]:
    hf, ours = f"model.layers.{number}.mlp", f"{ours}.mlp"
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    yield HfTensor(f"{hf}.gate.weight", (experts, hidden), f"{ours}.gate.weight")
    if config.topk_method == "noaux_tc":
        bias = "gate.e_score_correction_bias"
        yield HfTensor(f"{hf}.{bias}", (experts,), f"{ours}.{bias}", exact=True)
    for expert in range(experts):
        for half, name in enumerate(("gate_proj", "up_proj")):
            yield HfTensor(
                f"{hf}.experts.{expert}.{name}.weight",
                (width, hidden),
                f"{ours}.experts.gate_up_proj",
                place=(expert, half),
                quantised=True,
            )
    for expert in range(experts):
        yield HfTensor(
            f"{hf}.experts.{expert}.down_proj.weight",
            (hidden, width),
            f"{ours}.experts.down_proj",
            place=(expert,),
            quantised=True,
        )
