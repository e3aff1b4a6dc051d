"""Floating-point operations of training, by the peak that they run at, and MFU under mixed precision. Torch-free.

Counted are the products that the model as such asks for: a product of [m, k] and [k, n] is 2·m·n·k, its backward pass
(two products) twice that. What is computed again in the backward pass, quantisation, norms, softmax, the embedding and
the weighted sum of experts do not count. The attention core counts the keys that a causal mask leaves, (S + 1) / 2 of S
on average; a mask of documents is not subtracted. Routed experts count once for each that a token chooses.

MFU = Σ_kinds (operations of the kind ÷ peak of the kind) ÷ time of the step: the time that an ideal device would need,
as a share of the time taken, each product at the peak of its own arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from octofold.train.models.config import ModelConfig

FORWARD_AND_BACKWARD = 3
TERA = 1e12


def forward_products(model: ModelConfig, sequence_length: int) -> Iterator[tuple[str, float]]:
    """(name, operations a token) of every product of the forward pass, multi-token prediction included.

    Names are those of the modules that hold the weights, `layers.N.self_attn` for the attention core. A model class of
    your own is counted as its configuration describes it.

    Args:
        model: with `vocab_size` set.
        sequence_length: tokens that attention spans.
    """
    hidden, layers, depths = model.hidden_size, model.num_hidden_layers, model.num_nextn_predict_layers
    blocks = [(layer, f"layers.{layer}") for layer in range(layers)]
    blocks += [(layers + depth, f"mtp.{depth}.block") for depth in range(depths)]
    for layer, name in blocks:
        for part, flops in _attention(model, sequence_length):
            yield f"{name}.self_attn{part}", flops
        is_dense = model.mlp_kind(layer) == "dense"
        for part, flops in _feed_forward(hidden, model.intermediate_size) if is_dense else _experts(model):
            yield f"{name}.mlp.{part}", flops
    for depth in range(depths):
        yield f"mtp.{depth}.eh_proj", 2 * 2 * hidden * hidden
    yield "lm_head", (1 + depths) * 2 * hidden * model.vocab_size


def flops_a_token(
    model: ModelConfig, sequence_length: int, is_fp8: Callable[[str], bool], plain: str = "bf16"
) -> dict[str, float]:
    """Operations of a training step for each token, by the kind of arithmetic that runs them.

    Args:
        is_fp8: whether the products of a module, by its name, run on FP8 arithmetic. False where FP8 is emulated or
            only stored: those products run at the peak of `plain`.
        plain: the kind of all others. The gate computes in FP32 and counts here too; it is well below 1%.
    """
    of_kinds: dict[str, float] = {}
    for name, flops in forward_products(model, sequence_length):
        kind = "fp8" if is_fp8(name) else plain
        of_kinds[kind] = of_kinds.get(kind, 0.0) + FORWARD_AND_BACKWARD * flops
    return of_kinds


@dataclass(frozen=True)
class Utilisation:
    """What a rank makes of its device."""

    step_flops: Mapping[str, float]
    """Kind of arithmetic -> a rank's share of a step's operations."""
    peak_flops: Mapping[str, float]
    """Kind of arithmetic -> operations a second; may lack kinds."""

    def metrics(self, step_s: float) -> dict[str, float]:
        """`model_tflops`, TFLOP/s a rank, and `mfu` where the peaks of all kinds in use are known.

        Args:
            step_s: how long a step took.
        """
        metrics = {"model_tflops": sum(self.step_flops.values()) / step_s / TERA}
        if self.step_flops.keys() <= self.peak_flops.keys():
            ideal_s = sum(flops / self.peak_flops[kind] for kind, flops in self.step_flops.items())
            metrics["mfu"] = ideal_s / step_s
        return metrics


def known_peaks(device: Mapping[str, float] | None, said_tflops: Mapping[str, float]) -> dict[str, float]:
    """Kind of arithmetic -> peak in operations a second: what the user says, else what is known of the device.

    Args:
        device: `Capabilities.peak_flops`.
        said_tflops: `backend.peak_tflops_*` by kind; 0 says nothing.
    """
    return dict(device or {}) | {kind: tflops * TERA for kind, tflops in said_tflops.items() if tflops}


def _attention(model: ModelConfig, sequence_length: int) -> Iterator[tuple[str, float]]:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries, values = heads * model.qk_head_dim, heads * model.v_head_dim
    if model.q_lora_rank is None:
        yield ".q_proj", 2 * hidden * queries
    else:
        yield ".q_a_proj", 2 * hidden * model.q_lora_rank
        yield ".q_b_proj", 2 * model.q_lora_rank * queries
    yield ".kv_a_proj_with_mqa", 2 * hidden * (rank + model.qk_rope_head_dim)
    yield ".kv_b_proj", 2 * rank * (heads * model.qk_nope_head_dim + values)
    yield ".o_proj", 2 * values * hidden
    yield "", 2 * (sequence_length + 1) / 2 * (queries + values)


def _experts(model: ModelConfig) -> Iterator[tuple[str, float]]:
    hidden, width, chosen = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
    yield "gate", 2 * hidden * model.n_routed_experts
    yield "experts.gate_up_proj", chosen * 2 * hidden * 2 * width
    yield "experts.down_proj", chosen * 2 * width * hidden
    for part, flops in _feed_forward(hidden, model.n_shared_experts * width):
        yield f"shared_experts.{part}", flops


def _feed_forward(hidden: int, width: int) -> Iterator[tuple[str, float]]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield name, 2 * hidden * width
