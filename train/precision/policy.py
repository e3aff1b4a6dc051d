"""From the `precision` group to a recipe for each module, and what the start-up table says of them."""

from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from octofold.backends.base import Capabilities
from octofold.backends.errors import ConfigError
from octofold.kernels.config import KernelsConfig
from octofold.kernels.qtensor import E4M3, E5M2, Format
from octofold.kernels.recipe import Recipe, block_recipe, mx_recipe, tensor_recipe
from octofold.kernels.registry import EMULATIONS, Choice
from octofold.parallel.plan import ParallelPlan
from octofold.parallel.transport import Transport
from octofold.train.precision.config import FP8, PrecisionConfig, dispatch_tile

OPT_IN = ("embed_tokens", "lm_head", "*.eh_proj")
"""Modules that DeepSeek-V3 keeps in BF16: in FP8 only where an override names them and a recipe."""
MODULE_KINDS = {
    "embedding": "embed_tokens",
    "attention projections": "*.self_attn.*",
    "routed experts": "*.mlp.experts.*",
    "shared experts": "*.shared_experts.*",
    "dense feed-forward": "*.mlp.*",
    "projection of multi-token prediction": "*.eh_proj",
    "head": "lm_head",
}
"""Kind -> names of modules; the first that matches counts."""


def choices_for(precision: PrecisionConfig, module: str) -> PrecisionConfig:
    """The choices for a module by its name, opt-in modules included."""
    if any(fnmatchcase(module, pattern) for pattern in OPT_IN):
        precision = replace(precision, name="bf16")
    return precision.of_module(module)


def recipe_for(precision: PrecisionConfig, module: str) -> Recipe | None:
    """The FP8 recipe of a module; None: it computes in the compute dtype."""
    chosen = choices_for(precision, module)
    if chosen.name not in FP8:
        return None
    gradient = E5M2 if chosen.gradient_fmt == "e5m2" else E4M3
    choices: dict[str, object] = {
        "saves_fp8": chosen.saved == "fp8",
        "accumulation": chosen.accumulation,
        "arithmetic": "storage" if precision.arithmetic == "storage" else "product",
    }
    if chosen.name == "fp8_block":
        return block_recipe(chosen.name, chosen.block, chosen.scale_fmt, gradient, **choices)
    if chosen.name == "mxfp8":
        return mx_recipe(chosen.name, gradient, **choices)
    delayed = chosen.name == "fp8_tensor_delayed"
    return tensor_recipe(chosen.name, chosen.scale_fmt, gradient, delayed=delayed, **choices)


def transport_for(precision: PrecisionConfig, experts: str) -> Transport:
    """How tokens travel to the experts of the module named `experts`: FP8 with power-of-two scales, or BF16."""
    width = dispatch_tile(precision, experts)
    if width is None:
        return Transport()
    recipe = recipe_for(precision, f"{experts}.gate_up_proj")
    gradient = E4M3 if recipe is None else recipe.gradient.dtype
    return Transport(Format((1, width)), Format((1, width), dtype=gradient))


def lacking_arithmetic(precision: PrecisionConfig, capabilities: Capabilities) -> str | None:
    """What native products the run asks for and the device does not have; None: nothing."""
    asked = {precision.name, *(override.name for override in precision.overrides)}
    if precision.arithmetic != "native":
        return None
    if asked & set(FP8) and not capabilities.fp8:
        return "FP8"
    if "mxfp8" in asked and not capabilities.mxfp8:
        return "MXFP8 (tiles of 32 scaled inside the product)"
    return None


def require_arithmetic(precision: PrecisionConfig, capabilities: Capabilities) -> None:
    """Refuse products that the device does not have.

    Raises:
        ConfigError: with the device, what it has, and the ways out.
    """
    lacking = lacking_arithmetic(precision, capabilities)
    if lacking is None:
        return
    shown = f"precision.name={precision.name} precision.arithmetic=native"
    has = ", ".join(capabilities.native()) or "FP32 alone"
    rule = f"{capabilities.device_name} has no arithmetic in {lacking} but in {has}; none is put in its place unasked"
    remedy = (
        "precision.arithmetic=storage multiplies in BF16 and keeps and sends FP8, "
        "precision.arithmetic=emulate computes what FP8 hardware would (for numerics and tests; slower than BF16), "
        "precision=bf16 does without (with precision.dispatch=fp8, tokens still travel to experts in FP8)"
    )
    raise ConfigError("precision.arithmetic", shown, rule, remedy)


def require_products(precision: PrecisionConfig, kernels: KernelsConfig, choices: list[Choice]) -> None:
    """Refuse native products for which nobody has written a provider here, where none was named.

    Raises:
        ConfigError: with the product, why the first providers cannot serve, and the ways out.
    """
    for choice in choices if precision.arithmetic == "native" else []:
        op, is_product = choice.op, choice.op in ("scaled_mm", "scaled_grouped_mm")
        if is_product and choice.provider in EMULATIONS and getattr(kernels, op) == "auto":
            why = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected.items())
            shown = f"precision.name={precision.name} precision.arithmetic=native"
            rule = f"a native provider multiplies; {op} has none for this recipe ({why}), and none is emulated unasked"
            remedy = "precision.arithmetic=emulate, which decodes and multiplies in FP32, or precision=mxfp8"
            raise ConfigError("precision.arithmetic", shown, rule, remedy)


EXPERT_SIDES = {"gate_up_proj": 0, "down_proj": 1}
"""Where the width of an expert stands in its matrices: outputs of the first, inputs of the second."""


def require_whole_tiles(
    model: nn.Module, plan: ParallelPlan, precision: PrecisionConfig, *, tensor: int, expert_tensor: int
) -> None:
    """Refuse ranks of an axis that would cut a quantisation block: its halves would be scaled apart.

    Args:
        model: unsplit.
        tensor: ranks that split the plan's columns and rows.
        expert_tensor: ranks that split the experts along their width.

    Raises:
        ConfigError: naming the module, its width and the block.
    """
    splits = [("tensor", tensor, name, 0) for name in plan.columns]
    splits += [("tensor", tensor, name, 1) for name in plan.rows]
    for name in plan.experts:
        splits += [("expert_tensor", expert_tensor, f"{name}.{part}", dim) for part, dim in EXPERT_SIDES.items()]
    for axis, ranks, name, dim in splits:
        recipe = recipe_for(precision, name)
        if recipe is None or ranks == 1:
            continue
        stacked = axis == "expert_tensor"
        weight = model.get_parameter(name if stacked else f"{name}.weight")
        width = weight.shape[2 if stacked else dim]
        along = recipe.gradient if dim == 0 else recipe.activation
        tiles = (recipe.weight.tile[dim], recipe.turned_weight.tile[1 - dim], along.tile[1])
        cut = next((tile for tile in tiles if not tile or width % (ranks * tile)), None)
        if cut is not None:
            block = f"blocks of {cut}" if cut else "one scale a tensor"
            shown = f"parallel.{axis}={ranks} precision.name={recipe.name}"
            sides = ("outputs", "inputs")
            rule = f"{name} has {width} {sides[dim]} for {ranks} {axis} ranks, in {block}: none is cut"
            remedy = f"parallel.{axis}=1, a smaller precision.block, or the module in BF16 by precision.overrides"
            raise ConfigError(f"parallel.{axis}", shown, rule, remedy)


def plan_rows(
    precision: PrecisionConfig, modules: list[str], *, compute_dtype: torch.dtype, sends: bool
) -> dict[str, str]:
    """What the start-up table says of each kind of module: weights, products, what is kept, what is sent.

    Args:
        modules: names of all modules that may be in FP8.
        sends: whether experts stand on several ranks.
    """
    plain = str(compute_dtype).removeprefix("torch.").replace("float", "FP").replace("bFP16", "BF16")
    rows: dict[str, str] = {}
    seen: set[str] = set()
    for kind, pattern in MODULE_KINDS.items():
        names = [name for name in modules if name not in seen and fnmatchcase(name, pattern)]
        seen.update(names)
        counts: dict[str, int] = {}
        for name in names:
            text = _described(recipe_for(precision, name), precision, plain, is_table=kind == "embedding")
            counts[text] = counts.get(text, 0) + 1
        if sends and kind == "routed experts" and names:
            transport = transport_for(precision, names[0].rpartition(".")[0])
            there = plain if transport.dispatch is None else _format(transport.dispatch)
            rows["experts' exchange"] = f"tokens to experts {there}, back {plain}; gradients alike"
        if names:
            parts = [text if len(counts) == 1 else f"{number} x {text}" for text, number in counts.items()]
            rows[kind] = " | ".join(parts)
    rows["weights gathered, gradients summed"] = f"{plain}, {'FP64' if plain == 'FP64' else 'FP32'}"
    rows["gate, norms, attention core"] = f"{plain} with FP32 inside" if plain == "BF16" else plain
    return rows


def _described(recipe: Recipe | None, precision: PrecisionConfig, plain: str, *, is_table: bool) -> str:
    if recipe is None:
        return plain
    if is_table:
        return f"{plain}, rows rounded to {_format(recipe.activation)} where they are looked up"
    saved = _format(recipe.activation) if recipe.saves_fp8 else plain
    if recipe.arithmetic == "storage":
        return f"{recipe.name}: products {plain}; saves {saved}"
    products = _format(recipe.activation) + " x " + _format(recipe.weight)
    gradients = "" if recipe.gradient.dtype == E4M3 else ", gradients E5M2"
    how = {"native": "FP8 products", "emulate": "emulated products"}[precision.arithmetic]
    sums = "" if recipe.accumulation == "fp32" else ", sums as Hopper's"
    delayed = ", scales from past steps" if recipe.delayed else ""
    kept = "kept in FP8 until the next update" if precision.keep_weights else "quantised at each use"
    return f"{recipe.name}: {how} {products}{gradients}{sums}{delayed}; saves {saved}; weights {kept}"


def _format(format: Format) -> str:
    high, wide = format.tile
    tile = {(0, 0): "tensor"}.get((high, wide), f"{high}x{wide}")
    kind = "E4M3" if format.dtype == E4M3 else "E5M2"
    return f"{kind} {tile} {'FP32' if format.scale == 'float' else '2^n'}"
