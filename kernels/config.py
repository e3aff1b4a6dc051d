"""Which provider computes each public op. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelsConfig:
    """The `kernels` group: one key for each public op; `auto` takes the first provider that supports the device."""

    attention: str = "auto"
    grouped_mm: str = "auto"
    rms_norm: str = "auto"
    rotary: str = "auto"
    swiglu: str = "auto"
    gate_topk: str = "auto"
    permute: str = "auto"
    unpermute: str = "auto"
    quantize: str = "auto"
    quantize_groups: str = "auto"
    swiglu_quantize: str = "auto"
    dequantize: str = "auto"
    scaled_mm: str = "auto"
    scaled_grouped_mm: str = "auto"
    scaled_grouped_inner_mm: str = "auto"
