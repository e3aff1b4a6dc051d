"""AdamW whose moments are kept in FP32, BF16 or FP8. The update is always computed in the master dtype.

    fp32    both as wide as the master weights: torch's fused AdamW as it is
    bf16    both in BF16 (DeepSeek-V3, section 3.3.1)
    fp8     the first in E4M3, tiles of 128 numbers along this rank's flattened shard with a power of two each; the
            second in BF16

The second moment is not kept in FP8, as in FP8-LM (Peng et al. 2023), who keep it in 16 bits: an update moves it by
1 - beta2 = 5%, its square root by 2.5%, and E4M3 resolves 6% to 12%, so that it would never shrink again; and where it
is rounded to zero, the step is divided by eps.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from octofold.kernels.qtensor import Format, QTensor
from octofold.kernels.reference.quantize import quantize

TILES = Format(tile=(1, 128))


def moments_bytes(numel: int, kind: str, master_bytes: int) -> int:
    """Of both moments of so many numbers, kept as `optim.moments` says."""
    scales = -(-numel // TILES.tile[1])
    return {"fp32": 2 * master_bytes * numel, "bf16": 4 * numel, "fp8": 3 * numel + scales}[kind]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW; moments as wide as the parameters."""

    moments_dtype: torch.dtype | None = None

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """`exp_avg` and `exp_avg_sq` of a parameter, placed like it, to be read or written before the next step.

        They are made (zero) where they do not exist yet, so that a checkpoint can be read into them.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


class CompactAdamW(AdamW):
    """Moments in BF16 or FP8, widened to FP32 for the update, one parameter at a time. For FP32 parameters."""

    moments_dtype = torch.bfloat16

    def __init__(self, params: Any, *, kind: str, **choices: Any) -> None:
        """
        Args:
            params, choices: those of torch.optim.AdamW.
            kind: bf16 or fp8.
        """
        super().__init__(params, **choices)
        self.kind = kind

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `AdamW.moments`; BF16, which holds E4M3 times a power of two exactly."""
        state = self.state[parameter]
        packed = state.get("exp_avg")
        if isinstance(packed, QTensor):
            # It stays unpacked until the next step, so that what is written into it counts.
            state["exp_avg"] = torch.empty_like(parameter, dtype=torch.bfloat16)
            shard = _shard(state["exp_avg"])
            shard.copy_(packed.dequantize(torch.bfloat16).view(shard.shape))
        return super().moments(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        kept = {name: _shard(moment) for name, moment in self.moments(parameter).items()}
        wide = {name: moment.float() for name, moment in kept.items()}
        assert parameter.grad is not None
        adamw(
            [_shard(parameter)],
            [_shard(parameter.grad).float()],
            [wide["exp_avg"]],
            [wide["exp_avg_sq"]],
            [],
            [self.state[parameter]["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )
        kept["exp_avg_sq"].copy_(wide["exp_avg_sq"])
        if self.kind == "fp8":
            self.state[parameter]["exp_avg"] = quantize(wide["exp_avg"].view(1, -1), TILES)
        else:
            kept["exp_avg"].copy_(wide["exp_avg"])


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
