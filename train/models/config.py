"""What defines a model: dimensions and rules, in the names of the published `config.json` files. Torch-free.

What a layer is made of is asked by kind and layer number (`attention_kind`, `mlp_kind`, `gate_kind`), so that a family
whose layers differ adds a kind, not a copy of the decoder.
"""

from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError, check_finite, unknown_name_error

CHOICES = {"softmax": ["greedy", "group_limited_greedy"], "sigmoid": ["noaux_tc"]}
"""How experts may be chosen, by scoring function: DeepSeek-V2 and V2-Lite; DeepSeek-V3."""
ROPE_TYPES = ["default", "yarn"]
VOCABULARY_MULTIPLE = 64
"""What a vocabulary that comes from the tokenizer is rounded up to."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary embedding stretched to longer contexts: YaRN (arXiv 2309.00071) with DeepSeek's `mscale`."""

    type: str = "default"
    """default: frequencies as they are; yarn."""
    factor: float = 1.0
    """How many times longer than the original context."""
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are slowed down by `factor`; those between, by a share."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """The softmax scale grows by (0.1 · mscale_all_dim · ln factor + 1)²; 0 leaves it."""


@dataclass(frozen=True)
class BalanceConfig:
    """How expert load is kept even. Weights of losses; 0 switches one off. All losses are per sequence, averaged."""

    bias_update_rate: float = 0.001
    """Step of the expert bias against each expert's load error (DeepSeek-V3, section 2.1.2)."""
    bias_update_until: float = 1.0
    """Share of the run's updates after which the rate is 0 (DeepSeek-V3: 14.3T of 14.8T tokens)."""
    sequence_loss: float = 0.0
    """DeepSeek-V3, equations 17 to 20."""
    expert_loss: float = 0.0
    """DeepSeek-V2, equations 23 to 25."""
    device_loss: float = 0.0
    """DeepSeek-V2, equations 26 to 28; a device is one of the `n_group` groups of experts."""
    communication_loss: float = 0.0
    """DeepSeek-V2, equations 29 to 31."""
    z_loss: float = 0.0
    """Mean square of logsumexp(gate logits) (ST-MoE, equation 5)."""


@dataclass(frozen=True)
class MtpConfig:
    """Loss of multi-token prediction (DeepSeek-V3, equation 25): weight / depths · the sum of their cross-entropies."""

    loss_weight: float = 0.3
    late_loss_weight: float = 0.1
    late_from: float = 0.676
    """Share of the run's updates from which `late_loss_weight` holds (DeepSeek-V3: 10T of 14.8T tokens)."""


@dataclass(frozen=True)
class ModelConfig:
    """The `model` group: a decoder with multi-head latent attention (MLA) and DeepSeekMoE.

    Field names are those of Hugging Face's DeepSeek configurations, so that a value can be looked up there.
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
    """Standard deviation of the initial weights (DeepSeek-V2 and V3 were trained from 0.006)."""
    max_position_embeddings: int = 0
    """Longest sequence the model is meant for; 0: the run's sequence length."""

    num_attention_heads: int = 8
    q_lora_rank: int | None = None
    """Rank of the query's low-rank projection; null projects directly."""
    kv_lora_rank: int = 64
    """Numbers a token that keys and values are expanded from."""
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)

    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    n_group: int = 1
    """Groups of neighbouring experts, placed together: on a device in DeepSeek-V2, on a node in V3."""
    topk_group: int = 1
    """A token's experts come from at most this many groups, which bounds its traffic (node-limited routing)."""
    scoring_func: str = "sigmoid"
    """softmax (DeepSeek-V2) or sigmoid (V3)."""
    topk_method: str = "noaux_tc"
    """softmax: greedy, or group_limited_greedy (a group counts as its best expert); sigmoid: noaux_tc (choice by score
    plus bias; a group counts as the sum of its two best)."""
    norm_topk_prob: bool = True
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float = 1.0
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    num_nextn_predict_layers: int = 0
    """Multi-token prediction: so many further tokens are predicted at each position while training."""
    mtp: MtpConfig = field(default_factory=MtpConfig)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def choice_groups(self) -> int:
        """Groups that a gate chooses among before it chooses experts; 1: among all experts at once."""
        return 1 if self.topk_method == "greedy" else self.n_group

    @property
    def residual_kind(self) -> str:
        """How a layer's branches join the stream."""
        return "sum"

    def attention_kind(self, layer: int) -> str:
        """The attention of a layer; layers of multi-token prediction follow the others."""
        return "latent"

    def mlp_kind(self, layer: int) -> str:
        """dense or experts; layers of multi-token prediction follow the others."""
        return "dense" if layer < self.first_k_dense_replace else "experts"

    def gate_kind(self, layer: int) -> str:
        """How a layer with experts chooses among them."""
        return "top_k"


def check(model: ModelConfig) -> None:
    """Raise `ConfigError` for dimensions that cannot be built."""
    _check_sizes(model)
    _check_rope(model)
    _check_experts(model)
    _check_groups(model)
    _check_losses(model)


def _check_sizes(model: ModelConfig) -> None:
    positive = (
        "hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size n_group topk_group"
    )
    for name in positive.split():
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}", getattr(model, name), "must be at least 1", f"model.{name}=1 or more")
    if model.q_lora_rank is not None and model.q_lora_rank < 1:
        raise ConfigError(
            "model.q_lora_rank", model.q_lora_rank, "at least 1, or null for none", "model.q_lora_rank=null"
        )
    for name in (
        "vocab_size",
        "n_shared_experts",
        "initializer_range",
        "routed_scaling_factor",
        "max_position_embeddings",
        "num_nextn_predict_layers",
    ):
        check_finite(f"model.{name}", getattr(model, name), least=0.0)
    check_finite("model.rms_norm_eps", model.rms_norm_eps, least=1e-30)


def _check_rope(model: ModelConfig) -> None:
    check_finite("model.rope_theta", model.rope_theta, least=1e-30)
    if model.qk_rope_head_dim % 2:
        rule = "rotary position embedding turns pairs of numbers, so the width must be even"
        raise ConfigError("model.qk_rope_head_dim", model.qk_rope_head_dim, rule, "an even number")
    scaling = model.rope_scaling
    if scaling.type not in ROPE_TYPES:
        raise unknown_name_error("model.rope_scaling.type", scaling.type, ROPE_TYPES)
    if scaling.type == "default":
        return
    for name, least in (("factor", 1.0), ("original_max_position_embeddings", 1.0), ("beta_slow", 1e-6)):
        check_finite(f"model.rope_scaling.{name}", getattr(scaling, name), least=least)
    for name in ("mscale", "mscale_all_dim"):
        check_finite(f"model.rope_scaling.{name}", getattr(scaling, name), least=0.0)
    check_finite("model.rope_scaling.beta_fast", scaling.beta_fast, least=scaling.beta_slow)
    if model.rope_theta <= 1:
        rule = "YaRN tells fast from slow dimensions by the logarithm of theta, which must be above 1"
        raise ConfigError("model.rope_theta", model.rope_theta, rule, "model.rope_theta=10000")


def _check_experts(model: ModelConfig) -> None:
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
    if model.scoring_func not in CHOICES:
        raise unknown_name_error("model.scoring_func", model.scoring_func, list(CHOICES))
    methods = CHOICES[model.scoring_func]
    if model.topk_method not in methods:
        shown = f"model.scoring_func={model.scoring_func} model.topk_method={model.topk_method}"
        rule = f"a {model.scoring_func} gate chooses by: {', '.join(methods)}"
        raise ConfigError("model.topk_method", shown, rule, f"model.topk_method={methods[0]}")


def _check_groups(model: ModelConfig) -> None:
    experts, groups = model.n_routed_experts, model.n_group
    shown = f"model.n_routed_experts={experts} model.n_group={groups}"
    if experts % groups:
        legal = [g for g in range(1, experts + 1) if experts % g == 0]
        raise ConfigError("model.n_group", shown, "groups divide the experts evenly", f"model.n_group=one of {legal}")
    if model.topk_group > groups:
        shown = f"model.topk_group={model.topk_group} model.n_group={groups}"
        rule = "a token cannot choose from more groups than there are"
        raise ConfigError("model.topk_group", shown, rule, f"model.topk_group={groups} or fewer")
    if groups == 1 or model.topk_method == "greedy":
        return
    reachable = model.topk_group * (experts // groups)
    if model.num_experts_per_tok > reachable:
        shown = f"{shown} model.topk_group={model.topk_group} model.num_experts_per_tok={model.num_experts_per_tok}"
        rule = f"a token chooses among the {reachable} experts of its groups"
        raise ConfigError("model.topk_group", shown, rule, "more groups a token, or fewer experts a token")
    if model.topk_method == "noaux_tc" and experts == groups:
        rule = "noaux_tc scores a group by its two best experts, so a group holds at least two"
        raise ConfigError("model.n_group", shown, rule, f"model.n_group={max(1, experts // 2)} or fewer")


def _check_losses(model: ModelConfig) -> None:
    balance, mtp = model.balance, model.mtp
    for name in (
        "bias_update_rate",
        "sequence_loss",
        "expert_loss",
        "device_loss",
        "communication_loss",
        "z_loss",
    ):
        check_finite(f"model.balance.{name}", getattr(balance, name), least=0.0)
    for name in ("loss_weight", "late_loss_weight"):
        check_finite(f"model.mtp.{name}", getattr(mtp, name), least=0.0)
    for key, share in (
        ("model.balance.bias_update_until", balance.bias_update_until),
        ("model.mtp.late_from", mtp.late_from),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(key, share, "a share of the run's updates lies between 0 and 1", f"{key}=1.0")
    if balance.bias_update_rate and model.topk_method != "noaux_tc":
        shown = f"model.topk_method={model.topk_method} model.balance.bias_update_rate={balance.bias_update_rate}"
        rule = "only noaux_tc chooses with a bias"
        raise ConfigError("model.balance.bias_update_rate", shown, rule, "model.balance.bias_update_rate=0")
    for name in ("device_loss", "communication_loss"):
        if getattr(balance, name) and model.n_group == 1:
            shown = f"model.balance.{name}={getattr(balance, name)} model.n_group=1"
            rule = "it evens the load of several groups of experts"
            raise ConfigError(f"model.balance.{name}", shown, rule, f"model.balance.{name}=0, or model.n_group above 1")
