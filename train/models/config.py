"""What defines a model: dimensions and rules, in the names of the published `config.json` files. Torch-free."""

from dataclasses import dataclass

from octofold.backends.errors import ConfigError, check_finite


@dataclass(frozen=True)
class ModelConfig:
    """The `model` group: a decoder with multi-head latent attention (MLA) and DeepSeekMoE.

    Field names are those of Hugging Face's DeepSeek-V3 configuration, so that a value can be looked up there.
    """

    name: str = "deepseek"
    architecture: str = "deepseek"
    """deepseek, or a class of your own as package.module:Class (docs/extending.md)."""
    vocab_size: int = 0
    """0: the tokenizer's size, rounded up to a multiple of 64."""
    hidden_size: int = 256
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    """The first layers have a dense feed-forward network instead of experts."""
    intermediate_size: int = 768
    """Width of the dense feed-forward network."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    num_attention_heads: int = 8
    q_lora_rank: int | None = None
    """Rank of the query's low-rank projection; null projects directly."""
    kv_lora_rank: int = 64
    """Numbers a token that keys and values are expanded from."""
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0

    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    bias_update_rate: float = 0.001
    """Step of the expert bias against each expert's load error (DeepSeek-V3, section 2.1.2); 0 switches it off."""

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def check(model: ModelConfig) -> None:
    """Raise `ConfigError` for dimensions that cannot be built."""
    positive = (
        "hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size"
    )
    for name in positive.split():
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}", getattr(model, name), "must be at least 1", f"model.{name}=1 or more")
    if model.q_lora_rank is not None and model.q_lora_rank < 1:
        raise ConfigError(
            "model.q_lora_rank", model.q_lora_rank, "at least 1, or null for none", "model.q_lora_rank=null"
        )
    for name in ("vocab_size", "n_shared_experts", "initializer_range", "bias_update_rate", "routed_scaling_factor"):
        check_finite(f"model.{name}", getattr(model, name), least=0.0)
    for name in ("rms_norm_eps", "rope_theta"):
        check_finite(f"model.{name}", getattr(model, name), least=1e-30)
    if model.qk_rope_head_dim % 2:
        rule = "rotary position embedding turns pairs of numbers, so the width must be even"
        raise ConfigError("model.qk_rope_head_dim", model.qk_rope_head_dim, rule, "an even number")
    if model.num_experts_per_tok > model.n_routed_experts:
        shown = f"model.num_experts_per_tok={model.num_experts_per_tok} model.n_routed_experts={model.n_routed_experts}"
        rule = "a token cannot choose more experts than there are"
        raise ConfigError("model.num_experts_per_tok", shown, rule, "choose fewer experts a token, or add experts")
    if not 0 <= model.first_k_dense_replace <= model.num_hidden_layers:
        shown = (
            f"model.first_k_dense_replace={model.first_k_dense_replace} "
            f"model.num_hidden_layers={model.num_hidden_layers}"
        )
        rule = "dense layers are counted among all layers"
        raise ConfigError("model.first_k_dense_replace", shown, rule, f"0 to {model.num_hidden_layers}")
    if model.scoring_func != "sigmoid":
        raise ConfigError("model.scoring_func", model.scoring_func, "this version has the sigmoid gate", "sigmoid")
