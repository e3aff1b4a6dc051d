"""The model card of an exported checkpoint: what it is, what it was trained on, how to load it."""

import json
from dataclasses import dataclass
from typing import Any

from octofold.train.data.config import DataConfig
from octofold.train.models.config import ModelConfig
from octofold.train.models.hf_config import FAMILIES


@dataclass(frozen=True)
class Facts:
    """What the card tells."""

    model: ModelConfig
    data: DataConfig
    trained_in: str
    """Precision of the training run."""
    state: dict[str, Any]
    """Of the checkpoint: step, updates, tokens_seen; imported_from."""
    precision: str
    """Of the exported weights."""
    block: int
    power_of_two: bool
    license: str
    parameters: int
    """Numbers written, without repetitions."""


def model_card(facts: Facts) -> str:
    """README.md with the metadata that model hubs read on top."""
    model, state = facts.model, facts.state
    family = FAMILIES[model.scoring_func]
    front = [
        "---",
        f"license: {json.dumps(facts.license)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [octofold, mixture-of-experts, {family}]",
        "---",
    ]
    made = "written by Octofold" if not state["updates"] else "trained with Octofold"
    return "\n".join(
        [
            *front,
            f"# {model.name}",
            "",
            f"A mixture-of-experts language model, {family} in architecture, {made}.",
            "",
            "## Architecture",
            "",
            *_table({"parameters": f"{facts.parameters:,}", **_architecture(model)}),
            "",
            "## Training",
            "",
            *_training(facts),
            "",
            "## Weights",
            "",
            *_weights(facts),
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
            "",
        ]
    )


def _architecture(model: ModelConfig) -> dict[str, Any]:
    groups = f", {model.topk_group} of {model.n_group} groups" if model.n_group > 1 else ""
    experts = f"{model.n_routed_experts} routed, {model.num_experts_per_tok} a token{groups}"
    rope = model.rope_scaling
    stretch = f"YaRN x{rope.factor:g} from {rope.original_max_position_embeddings}" if rope.type == "yarn" else "plain"
    return {
        "layers": f"{model.num_hidden_layers}, the first {model.first_k_dense_replace} dense",
        "hidden size": model.hidden_size,
        "attention": f"latent, {model.num_attention_heads} heads, rank {model.kv_lora_rank} "
        f"(queries: {model.q_lora_rank or 'direct'}), rotary embedding {stretch}",
        "experts": f"{experts}, {model.n_shared_experts} shared",
        "gate": f"{model.scoring_func}, {model.topk_method}",
        "multi-token prediction": f"{model.num_nextn_predict_layers} layer(s)",
        "vocabulary": model.vocab_size,
    }


def _training(facts: Facts) -> list[str]:
    """What this run did; of what came before it, only where it began is known."""
    state, origin = facts.state, facts.state.get("imported_from")
    if not origin:
        return _table(_figures(facts))
    if not state["updates"]:
        return [f"The weights are those of {origin}."]
    return [f"The weights are those of {origin}, trained further:", "", *_table(_figures(facts))]


def _figures(facts: Facts) -> dict[str, Any]:
    state = facts.state
    master = "FP64" if facts.trained_in == "fp64" else "FP32"
    return {
        "tokens seen": f"{state['tokens_seen']:,}",
        "updates": f"{state['updates']:,}",
        "data": facts.data.source + (f" ({facts.data.path.rpartition('/')[2]})" if facts.data.path else ""),
        "tokenizer": facts.data.tokenizer.rpartition("/")[2],
        "sequence length": facts.data.sequence_length,
        "precision": f"{facts.trained_in}, master weights in {master}",
    }


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _weights(facts: Facts) -> list[str]:
    if facts.precision != "fp8":
        lines = [f"{'FP32' if facts.precision == 'fp32' else 'BF16'}; the gate's bias in FP32."]
    else:
        scales = "powers of two" if facts.power_of_two else "FP32"
        lines = [
            f"Linear layers in FP8 (E4M3), blocks of {facts.block} x {facts.block}: weight x weight_scale_inv, scales "
            f"{scales}. All else in BF16, the gate's bias in FP32. Blocks at the edges of a matrix are partial where "
            f"its sizes are no multiples of {facts.block}; transformers 5.23 cannot load such matrices on a CPU."
        ]
    if facts.model.num_nextn_predict_layers:
        first = facts.model.num_hidden_layers
        lines.append(
            f"Multi-token prediction lies in model.layers.{first} and up; readers without a use for it ignore that."
        )
    return lines
