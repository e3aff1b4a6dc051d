"""The `precision` group: in what numbers a run computes, saves and sends. Torch-free."""

from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase

from octofold.backends.errors import ConfigError, check_finite, unknown_name_error

PLAIN = ["bf16", "fp32", "fp64"]
FP8 = ["fp8_block", "fp8_tensor_current", "fp8_tensor_delayed", "mxfp8"]
ARITHMETIC = ["native", "emulate", "storage"]
MX_TILE = 32
LOSS_SCALES = ["none", "static", "dynamic"]
LARGEST_SCALE = 2.0**126


@dataclass(frozen=True)
class OverrideConfig:
    """Other choices for the modules whose names match; what is null stays as the group has it."""

    match: str = ""
    """Names of linear modules with * and ?, such as `layers.0.*`, `*.o_proj`, `lm_head`, `*.mlp.experts.*`."""
    name: str | None = None
    """bf16 or one of the FP8 recipes."""
    block: int | None = None
    scale_fmt: str | None = None
    gradient_fmt: str | None = None
    saved: str | None = None
    accumulation: str | None = None


@dataclass(frozen=True)
class LossScaleConfig:
    """`precision.loss_scale`: the loss is multiplied by it before the backward pass, gradients are divided after."""

    kind: str = "none"
    """none; static: `init` throughout; dynamic: grows while all is well, shrinks when a gradient overflows."""
    init: float = 65536.0
    growth: float = 2.0
    growth_interval: int = 2000
    """dynamic: applied updates in a row without overflow before the scale grows."""
    backoff: float = 0.5
    hysteresis: int = 1
    """dynamic: overflows, since the scale last grew or shrank, before it shrinks."""
    least: float = 1.0
    most: float = 2.0**40


@dataclass(frozen=True)
class PrecisionConfig:
    """The `precision` group. Master weights and gradients are FP32 (FP64 under fp64)."""

    name: str = "bf16"
    """bf16, fp32, fp64 (for proofs of layouts), or linear layers in FP8: fp8_block (DeepSeek-V3), fp8_tensor_current,
    fp8_tensor_delayed, mxfp8."""
    arithmetic: str = "native"
    """FP8 on a device that has it (native), computed exactly as such by other means (emulate), or only where tensors
    are kept and sent, with BF16 products (storage)."""
    block: int = 128
    """fp8_block: length of a tile of activations and gradients, edge of a block of weights."""
    scale_fmt: str = "ue8m0"
    """fp8_block and the tensor recipes: ue8m0 (powers of two, DeepSeek-V3.1) or float (DeepSeek-V3)."""
    gradient_fmt: str = "e4m3"
    """Of gradients: e4m3 or e5m2."""
    saved: str = "fp8"
    """What linear layers keep of their input for the backward pass: fp8 or bf16."""
    dispatch: str = "auto"
    """What tokens travel to experts as, and gradients of their outputs: fp8, bf16; auto: fp8 where experts compute so.
    The way back is BF16."""
    accumulation: str = "fp32"
    """hopper: products add as imprecisely as Hopper's tensor cores do (slow; for studies)."""
    keep_weights: bool = True
    """Keep quantised weights until the next update, over all micro-batches; false: quantise at each use."""
    amax_history: int = 16
    """fp8_tensor_delayed: steps whose largest magnitude sets the scale."""
    watch_every: int = 50
    """Steps between samples of the health of quantised tensors; 0: none."""
    overrides: list[OverrideConfig] = field(default_factory=list)
    """Exceptions by module; a later one wins."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    @property
    def is_fp8(self) -> bool:
        """Whether any module may compute in FP8."""
        return self.name in FP8 or any(override.name in FP8 for override in self.overrides)

    def of_module(self, module: str) -> "PrecisionConfig":
        """The choices for a module by its name."""
        chosen = self
        for override in self.overrides:
            if fnmatchcase(module, override.match):
                chosen = chosen.with_override(override)
        return chosen

    def with_override(self, override: OverrideConfig) -> "PrecisionConfig":
        """What an override changes, whatever it matches."""
        named = {f.name: getattr(override, f.name) for f in fields(override) if f.name != "match"}
        return replace(self, **{key: value for key, value in named.items() if value is not None})


def dispatch_tile(precision: PrecisionConfig, experts: str) -> int | None:
    """How many numbers of a token share a scale on the way to the experts of the module of this name.

    None: tokens travel in the compute dtype.
    """
    chosen = precision.of_module(f"{experts}.gate_up_proj")
    if precision.dispatch == "bf16" or (precision.dispatch == "auto" and chosen.name not in FP8):
        return None
    return {"fp8_block": chosen.block, "mxfp8": MX_TILE}.get(chosen.name, precision.block)


def check(precision: PrecisionConfig) -> None:
    """Every rule that needs neither torch nor a device.

    Raises:
        ConfigError: naming the key, the value, the rule and the remedy.
    """
    _one_of("precision.name", precision.name, [*PLAIN, *FP8])
    _one_of("precision.arithmetic", precision.arithmetic, ARITHMETIC)
    _one_of("precision.dispatch", precision.dispatch, ["auto", "fp8", "bf16"])
    _check_choices("precision", precision)
    _check_mx("precision", precision)
    for index, override in enumerate(precision.overrides):
        key = f"precision.overrides[{index}]"
        if not override.match:
            raise ConfigError(f"{key}.match", "''", "an override names the modules it is for", "match: '*.o_proj'")
        _one_of(f"{key}.name", override.name or "bf16", ["bf16", *FP8])
        _check_choices(key, precision.with_override(override))
        _check_mx(key, override)
    if precision.is_fp8 and precision.name in ("fp32", "fp64"):
        shown = f"precision.name={precision.name} precision.overrides"
        raise ConfigError("precision.overrides", shown, "FP8 modules stand in a BF16 model", "precision=bf16")
    if precision.name == "fp64" and precision.dispatch == "fp8":
        shown = "precision.name=fp64 precision.dispatch=fp8"
        rule = "FP64 is for proofs of layouts, and eight bits on the way would be what they find"
        raise ConfigError("precision.dispatch", shown, rule, "precision.dispatch=auto")
    sums = {precision.accumulation, *(override.accumulation for override in precision.overrides)}
    if precision.arithmetic == "storage" and "hopper" in sums:
        shown = "precision.arithmetic=storage precision.accumulation=hopper"
        rule = "storage multiplies in BF16, so that no FP8 product adds anything"
        raise ConfigError("precision.accumulation", shown, rule, "precision.arithmetic=emulate")
    for name, least in (("amax_history", 1), ("watch_every", 0)):
        if getattr(precision, name) < least:
            raise ConfigError(f"precision.{name}", getattr(precision, name), f"at least {least}", f"{least} or more")
    _check_loss_scale(precision.loss_scale)


def _one_of(key: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise unknown_name_error(key, value, known)


def _check_choices(key: str, choices: PrecisionConfig) -> None:
    _one_of(f"{key}.scale_fmt", choices.scale_fmt, ["ue8m0", "float"])
    _one_of(f"{key}.gradient_fmt", choices.gradient_fmt, ["e4m3", "e5m2"])
    _one_of(f"{key}.saved", choices.saved, ["fp8", "bf16"])
    _one_of(f"{key}.accumulation", choices.accumulation, ["fp32", "hopper"])
    if choices.block < 16 or choices.block % 16:
        rule = "a block is a multiple of 16 numbers, the vector width of FP8 products"
        raise ConfigError(f"{key}.block", choices.block, rule, f"{key}.block=128")


def _check_mx(key: str, choices: PrecisionConfig | OverrideConfig) -> None:
    """Refuse what MXFP8 has no choice of."""
    if choices.name != "mxfp8":
        return
    for name, fixed in (("block", 128), ("scale_fmt", "ue8m0")):
        if getattr(choices, name) not in (None, fixed):
            shown = f"{key}.name=mxfp8 {key}.{name}={getattr(choices, name)}"
            rule = "tiles of 32 with power-of-two scales are what makes MXFP8"
            raise ConfigError(f"{key}.{name}", shown, rule, f"leave {key}.{name} out, or {key}.name=fp8_block")


def _check_loss_scale(scale: LossScaleConfig) -> None:
    key = "precision.loss_scale"
    _one_of(f"{key}.kind", scale.kind, LOSS_SCALES)
    for name, least in (("init", 2.0**-40), ("growth", 1.0), ("least", 2.0**-40), ("most", 2.0**-40)):
        check_finite(f"{key}.{name}", getattr(scale, name), least=least)
    for name in ("growth_interval", "hysteresis"):
        if getattr(scale, name) < 1:
            raise ConfigError(f"{key}.{name}", getattr(scale, name), "at least 1", f"{key}.{name}=1")
    if scale.most > LARGEST_SCALE:
        raise ConfigError(f"{key}.most", scale.most, "FP32 holds the scale and its inverse", f"{key}.most={2.0**40:g}")
    if not 0 < scale.backoff < 1:
        raise ConfigError(f"{key}.backoff", scale.backoff, "between 0 and 1, so that the scale shrinks", "0.5")
    if not scale.least <= scale.init <= scale.most:
        shown = f"{key}.least={scale.least:g} {key}.init={scale.init:g} {key}.most={scale.most:g}"
        raise ConfigError(key, shown, "the first scale lies within the bounds", f"{key}.init={scale.least:g}")
