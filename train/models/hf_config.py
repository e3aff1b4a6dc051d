"""A model's `config.json` as Hugging Face, vLLM and llama.cpp read it, both ways. Torch-free.

What transformers writes itself lacks `scoring_func` and `topk_method` for DeepSeek-V3, without which other readers
fail or choose another gate; ours holds every key that the released files hold.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from octofold.backends.errors import UserError
from octofold.train.models.config import CHOICES, ROPE_TYPES, BalanceConfig, ModelConfig, RopeScalingConfig

SAME = (
    "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size rms_norm_eps tie_word_embeddings "
    "initializer_range max_position_embeddings num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim rope_theta n_routed_experts n_shared_experts num_experts_per_tok "
    "moe_intermediate_size n_group topk_group norm_topk_prob routed_scaling_factor num_nextn_predict_layers"
)
"""Keys that mean the same in both."""
OPTIONAL = "tie_word_embeddings initializer_range max_position_embeddings rope_theta num_nextn_predict_layers"
"""Of these, those that a config.json may leave out: readers agree on what that means."""
NULLABLE = "q_lora_rank n_shared_experts n_group topk_group num_nextn_predict_layers"
"""Those that may be null: no rank, no shared expert, one group, no further tokens."""
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


def to_hf(
    model: ModelConfig,
    *,
    dtype: str,
    sequence_length: int,
    bos_id: int | None,
    eos_id: int | list[int] | None,
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
    known = isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"
    known = known and quantization.get("fmt", "e4m3") == "e4m3"
    known = known and quantization.get("scale_fmt") in (None, "float", "ue8m0")
    block = quantization.get("weight_block_size") if known else None
    if isinstance(block, list) and len(block) == 2 and block[0] == block[1] and type(block[0]) is int and block[0] > 0:
        return block[0]
    raise UserError(
        f"config.json: quantization_config={quantization}\n"
        "  rule:   weights are BF16, FP16, FP32, or FP8 (e4m3) in square blocks with scales in float or ue8m0\n"
        "  remedy: a checkpoint in one of these"
    )


def refuse_to_publish(model: ModelConfig) -> None:
    """Raise `UserError` where readers of the family would compute something else."""
    if model.scoring_func != "softmax":
        return
    if model.norm_topk_prob:
        _refuse(["model.norm_topk_prob=true"], "readers of DeepSeek-V2 do not divide the weights of the chosen experts")
    if model.num_nextn_predict_layers:
        shown = f"model.num_nextn_predict_layers={model.num_nextn_predict_layers}"
        _refuse([shown], "DeepSeek-V2 has no multi-token prediction", "export.mtp=false leaves it out")


def _refuse(faults: list[str], rule: str, remedy: str = "name a DeepSeek-V2, V2-Lite or V3 checkpoint") -> None:
    if faults:
        raise UserError("; ".join(faults) + f"\n  rule:   {rule}\n  remedy: {remedy}")


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Reads the released files, ours, and what transformers writes (`rope_parameters`; no scoring_func and topk_method).
    What would change the model is never guessed: readers differ in their defaults.

    Raises:
        UserError: naming every key that is missing, of another type, or asks for what the model does not compute.
    """
    family = config.get("model_type")
    if family not in list(CLASSES):
        _refuse([f"config.json: model_type={family}"], f"one of: {', '.join(CLASSES)}")
    faults, values = _numbers(config)
    faults += [
        f"{key}={config[key]} (only {legal[0]})"
        for key, legal in FIXED.items()
        if key in config and config[key] not in legal
    ]
    faults += [f"{key}={config[key]} (sparse attention)" for key in config if key.startswith("index_")]
    scoring = next(name for name, kind in FAMILIES.items() if kind == family)
    method = config.get("topk_method") or CHOICES[scoring][0]
    if config.get("scoring_func") not in (None, scoring):
        faults.append(f"scoring_func={config['scoring_func']} ({family} has {scoring})")
    if method not in CHOICES[scoring]:
        faults.append(f"topk_method={method} ({family} has {' or '.join(CHOICES[scoring])})")
    if scoring == "softmax" and values.get("norm_topk_prob"):
        faults.append("norm_topk_prob=True (readers of DeepSeek-V2 do not divide the weights)")
    rope, theta = _rope(config, faults)
    _refuse([f"config.json: {fault}" for fault in faults], "the model computes what config.json says, and nothing else")
    if scoring == "softmax":
        values["num_nextn_predict_layers"] = 0
    alpha = config.get("aux_loss_alpha")
    alpha = float(alpha) if alpha is not None and _is_number(alpha) else 0.0
    if method == "noaux_tc":
        balance = BalanceConfig(sequence_loss=alpha)
    else:
        balance = BalanceConfig(bias_update_rate=0.0, expert_loss=alpha)
    values |= {"rope_theta": theta, "rope_scaling": rope, "balance": balance}
    return ModelConfig(scoring_func=scoring, topk_method=method, **values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with the keys of `SAME`, and their values in the types of `ModelConfig`."""
    faults: list[str] = []
    values: dict[str, Any] = {}
    defaults = ModelConfig()
    for name in SAME.split():
        if name not in config:
            faults += [] if name in OPTIONAL.split() else [f"{name} is missing"]
            continue
        value, default = config[name], getattr(defaults, name)
        if value is None and name in (*NULLABLE.split(), *OPTIONAL.split()):
            if name in NULLABLE.split():
                values[name] = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}.get(name, 0)
        elif isinstance(default, bool):
            faults += [] if isinstance(value, bool) else [f"{name}={value} (true or false)"]
            values[name] = value
        elif isinstance(default, float):
            faults += [] if _is_number(value) else [f"{name}={value} (a number)"]
            values[name] = float(value) if _is_number(value) else value
        else:
            faults += [] if _is_number(value) and isinstance(value, int) else [f"{name}={value} (a whole number)"]
            values[name] = value
    return faults, values


def _rope(config: Mapping[str, Any], faults: list[str]) -> tuple[RopeScalingConfig, float]:
    """The rotary embedding's stretch and theta, from either layout; what is not understood joins `faults`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        faults.append(f"rope_scaling={given} (keys and values)")
        given = {}
    given = {key: value for key, value in given.items() if value is not None}
    theta = given.pop("rope_theta", config.get("rope_theta") or 10000.0)
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    known = {field.name for field in fields(RopeScalingConfig)} if kind == "yarn" else set()
    if kind not in ROPE_TYPES:
        faults.append(f"rope type {kind} (only default and yarn)")
    else:
        faults += [
            f"rope_scaling.{key}={value} (unknown for {kind})" for key, value in given.items() if key not in known
        ]
    given = {key: value for key, value in given.items() if key in known}
    for key, value in {"rope_theta": theta, **given}.items():
        if not _is_number(value):
            faults.append(f"{key}={value} (a number)")
    # Readers differ in what they take for one that is missing.
    needed = ["factor", "original_max_position_embeddings"] if kind == "yarn" else []
    needed += ["mscale"] if given.get("mscale_all_dim") else []
    faults += [f"rope_scaling.{key} is missing" for key in needed if key not in given]
    if faults:
        return RopeScalingConfig(), 10000.0
    values: dict[str, Any] = {k: int(v) if k.startswith("original") else float(v) for k, v in given.items()}
    return RopeScalingConfig(type=kind, **values), float(theta)
