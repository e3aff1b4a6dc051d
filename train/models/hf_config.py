"""A model's `config.json` as Hugging Face, vLLM and llama.cpp read it, both ways. Torch-free.

What transformers writes itself lacks `scoring_func` and `topk_method` for DeepSeek-V3, without which other readers
fail or choose another gate; ours holds every key that the released files hold.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from octofold.backends.errors import UserError
from octofold.train.models.config import BalanceConfig, ModelConfig, RopeScalingConfig

SAME = (
    "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size rms_norm_eps tie_word_embeddings "
    "initializer_range max_position_embeddings num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim rope_theta n_routed_experts n_shared_experts num_experts_per_tok "
    "moe_intermediate_size n_group topk_group norm_topk_prob routed_scaling_factor num_nextn_predict_layers"
)
"""Keys that mean the same in both."""
REQUIRED = (
    "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size"
)
FAMILIES = {"softmax": "deepseek_v2", "sigmoid": "deepseek_v3"}
"""`model_type` by scoring function."""
CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
FIXED: dict[str, list[Any]] = {
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "moe_layer_freq": [1],
    "rope_interleave": [True, None],
    "attention_dropout": [0, 0.0],
}
"""What the model computes whatever a config says, so it must say that."""
REMEDY = "\n  remedy: name a DeepSeek-V2, V2-Lite or V3 checkpoint"


def to_hf(
    model: ModelConfig,
    *,
    dtype: str,
    sequence_length: int,
    bos_id: int | None,
    eos_id: int | None,
    quantization: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        model: with its vocabulary size.
        dtype: of the tensors that are not quantised: bfloat16 or float32.
        sequence_length: stands in for a `max_position_embeddings` of 0.
        quantization: from `fp8_quantization`, or None.
    """
    family = FAMILIES[model.scoring_func]
    config: dict[str, Any] = {"architectures": [CLASSES[family]], "model_type": family}
    config |= {name: getattr(model, name) for name in SAME.split()}
    config |= {
        "max_position_embeddings": model.max_position_embeddings or sequence_length,
        "num_key_value_heads": model.num_attention_heads,
        "scoring_func": model.scoring_func,
        "topk_method": model.topk_method,
        "rope_scaling": None if model.rope_scaling.type == "default" else vars(model.rope_scaling),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "seq_aux": True,
        "aux_loss_alpha": model.balance.sequence_loss or model.balance.expert_loss,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    if quantization:
        config["quantization_config"] = dict(quantization)
    return config


def fp8_quantization(*, block: int, power_of_two: bool) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in FP8 blocks."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    return {**config, "scale_fmt": "ue8m0"} if power_of_two else config


def fp8_block(config: Mapping[str, Any]) -> int | None:
    """The edge of the FP8 blocks that a config.json tells of; None: the checkpoint is not quantised.

    Raises:
        UserError: it is quantised in another way.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    block = quantization.get("weight_block_size") or [0, 1]
    if (quantization.get("quant_method"), quantization.get("fmt", "e4m3")) != ("fp8", "e4m3") or block[0] != block[1]:
        raise UserError(
            f"config.json: quantization_config={dict(quantization)}\n"
            "  rule:   weights are BF16, FP16, FP32, or FP8 (e4m3) in square blocks\n"
            "  remedy: a checkpoint in one of these"
        )
    return int(block[0])


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Reads the released files, ours, and what transformers writes (`rope_parameters`; no scoring_func and topk_method).

    Raises:
        UserError: naming every key that asks for what the model does not compute, or that is missing.
    """
    family = config.get("model_type")
    if family not in CLASSES:
        raise UserError(f"config.json: model_type={family}\n  rule:   one of: {', '.join(CLASSES)}{REMEDY}")
    faults = [f"{name} is missing" for name in REQUIRED.split() if config.get(name) is None]
    faults += [
        f"{name}={config[name]} (a number)"
        for name in SAME.split()
        if config.get(name) is not None and not isinstance(config[name], int | float)
    ]
    faults += [
        f"{key}={config[key]} (only {legal[0]})"
        for key, legal in FIXED.items()
        if key in config and config[key] not in legal
    ]
    faults += [f"{key}={config[key]} (sparse attention)" for key in config if key.startswith("index_")]
    scoring, method = ("sigmoid", "noaux_tc") if family == "deepseek_v3" else ("softmax", "greedy")
    scoring, method = config.get("scoring_func") or scoring, config.get("topk_method") or method
    rope, theta = _rope(config, faults)
    if faults:
        rule = "the model computes nothing else"
        raise UserError("config.json: " + "; ".join(faults) + f"\n  rule:   {rule}{REMEDY}")
    values: dict[str, Any] = {name: config[name] for name in SAME.split() if config.get(name) is not None}
    values |= {"rope_theta": theta, "rope_scaling": rope, "q_lora_rank": config.get("q_lora_rank")}
    if family == "deepseek_v2":
        values.setdefault("norm_topk_prob", False)
        values["num_nextn_predict_layers"] = 0
    alpha = float(config.get("aux_loss_alpha") or 0.0)
    if method == "noaux_tc":
        balance = BalanceConfig(sequence_loss=alpha)
    else:
        balance = BalanceConfig(bias_update_rate=0.0, expert_loss=alpha)
    model = ModelConfig(scoring_func=scoring, topk_method=method, balance=balance)
    # JSON does not tell whole numbers from broken ones, a dataclass does.
    broken = [field.name for field in fields(model) if isinstance(getattr(model, field.name), float)]
    typed: dict[str, Any] = {k: float(v) if k in broken else v for k, v in values.items()}
    return replace(model, **typed)


def _rope(config: Mapping[str, Any], faults: list[str]) -> tuple[RopeScalingConfig, float]:
    """The rotary embedding's stretch and theta, from either layout; what is not understood joins `faults`."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", config.get("rope_theta") or 10000.0))
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind == "default":
        return RopeScalingConfig(), theta
    known = {field.name for field in fields(RopeScalingConfig)}
    if kind != "yarn":
        faults.append(f"rope type {kind} (only default and yarn)")
    faults += [f"rope_scaling.{key}={value} (unknown)" for key, value in given.items() if key not in known]
    values: dict[str, Any] = {key: value for key, value in given.items() if key in known and value is not None}
    for key in values:
        values[key] = int(values[key]) if key.startswith("original") else float(values[key])
    # A config that names neither means: attention grows by the factor alone, which mscale_all_dim=0 says.
    return RopeScalingConfig(type="yarn", **values), theta
