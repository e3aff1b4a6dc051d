"""Watches what is quantised while a run trains: how much falls to zero, how much is clipped, how much noise is added.

At every N-th step each FP8 module is given an observer; what it sees is added up on the device, over micro-batches, and
read once at the end of the accumulation. Magnitudes and scales are those of whole tensors. Everything that needs each
number is estimated from some `SAMPLED_ROWS` evenly spaced rows of a tensor (spread over the experts of a stack),
weighted by how many rows each stands for, so that a sampled step costs a fraction of a step and all others nothing.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from octofold.backends.collectives import all_reduce_max, all_reduce_sum
from octofold.kernels.fp8 import TENSOR_KINDS, Fp8State
from octofold.kernels.fp8_bits import decode, decode_scale
from octofold.kernels.qtensor import LEAST_SCALE, QTensor, spread

SAMPLED_ROWS = 256
ROUNDING = 2.0**-20
"""An FP32 scale is rounded, so the largest number of its own tile may lie this share beyond what it can hold."""
SUMS = ("underflow", "saturation", "elements", "signal", "noise", "non_finite_tiles")
MAXIMA = ("amax", "highest", "lowest")
"""Largest magnitude, log2 of the largest scale, −log2 of the smallest."""

Health = dict[str, dict[str, dict[str, float]]]
"""Kind of tensor -> module -> metric (`octofold.train.metrics` says what they are)."""


class Watch:
    """Samples the health of the tensors that FP8 modules quantise. Collective: every rank samples the same steps."""

    def __init__(
        self, states: Mapping[str, Fp8State], every: int, device: torch.device, names: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            states: name -> state of every FP8 module of this rank.
            names: of every FP8 module of the model, alike on every rank; None: they are all on this rank.
            every: steps between samples; 0: none.
            device: where sums are kept.
        """
        self._states, self._every, self._device = dict(states), every, device
        self._names = list(states if names is None else names)
        self._sampling = False
        self._sums: torch.Tensor
        self._maxima: torch.Tensor

    def begin(self, step: int) -> None:
        """Before the first forward pass of a step: watch it if it is a multiple of `every`."""
        self._sampling = bool(self._names) and self._every > 0 and step % self._every == 0
        if not self._sampling:
            return
        shape = (len(self._names), len(TENSOR_KINDS))
        self._sums = torch.zeros(*shape, len(SUMS), dtype=torch.float64, device=self._device)
        self._maxima = torch.full((*shape, len(MAXIMA)), -math.inf, device=self._device)
        for name, state in self._states.items():
            number = self._names.index(name)
            state.observer = _ModuleWatch(self._sums[number], self._maxima[number])
            # Weights kept from an evaluation would otherwise not be quantised, and not be seen.
            state.forget()

    def collect(self) -> Health | None:
        """After the last backward pass of a step: what was seen on all ranks; None where the step was not watched.

        Two all-reduces over the default group and one wait for the device. A kind of tensor that a module quantised
        nowhere (experts without a token, a weight that is multiplied with another's) is absent.
        """
        if not self._sampling:
            return None
        self._sampling = False
        for state in self._states.values():
            state.observer = None
        all_reduce_sum(self._sums)
        all_reduce_max(self._maxima)
        sums_MKS, maxima_MKX = self._sums.tolist(), self._maxima.tolist()
        health: Health = {kind: {} for kind in TENSOR_KINDS}
        for module, of_kinds in zip(self._names, zip(sums_MKS, maxima_MKX, strict=True), strict=True):
            for kind, sums_S, maxima_X in zip(TENSOR_KINDS, *of_kinds, strict=True):
                if maxima_X[0] > -math.inf:
                    health[kind][module] = _metrics(
                        dict(zip(SUMS, sums_S, strict=True)), dict(zip(MAXIMA, maxima_X, strict=True))
                    )
        return health


class _ModuleWatch:
    """The observer of one module."""

    wants_products = False
    """They are `octofold verify precision`'s concern, and their operands would take the memory that FP8 saves."""

    def __init__(self, sums_KS: torch.Tensor, maxima_KX: torch.Tensor) -> None:
        self._sums_KS, self._maxima_KX = sums_KS, maxima_KX

    @torch.no_grad()
    def tensor(self, kind: str, x: torch.Tensor, quantized: QTensor) -> None:
        """Add a tensor; nothing waits for the device."""
        if not x.numel():
            return
        row = TENSOR_KINDS.index(kind)
        scale = decode_scale(quantized.scale)
        self._sums_KS[row] += _sums(x, quantized, scale)
        torch.maximum(self._maxima_KX[row], _maxima(x, quantized, scale), out=self._maxima_KX[row])

    def product(
        self,
        kind: str,
        a: torch.Tensor,
        b: torch.Tensor,
        found: torch.Tensor,
        counts_E: torch.Tensor | None,
        layout: str,
        source: torch.Tensor | None = None,
    ) -> None:
        """Not called."""


def _sums(x: torch.Tensor, quantized: QTensor, scale: torch.Tensor) -> torch.Tensor:
    """`SUMS` of a tensor [..., R, C], FP64; numbers in tiles that are not finite count in the last alone."""
    format, rows = quantized.format, x.shape[-2]
    step = min(rows, -(-x.shape[:-1].numel() // SAMPLED_ROWS))
    # From the middle of each strip: a first row may be special (the first token of a sequence draws attention).
    first = step // 2
    exact, data = x[..., first::step, :].float(), decode(quantized.data[..., first::step, :])
    sampled_scale = scale
    if scale.shape[-2] > 1:
        sampled_scale = scale[..., torch.arange(first, rows, step, device=x.device) // format.tile[0], :]
    tile_scale = spread(sampled_scale, (1, format.tile[1]), exact.shape)
    finite = torch.isfinite(tile_scale).expand_as(exact)
    exact = torch.where(finite, exact, 0.0)
    magnitude, error = exact.abs(), exact - torch.where(finite, data * tile_scale, 0.0)
    # Squares are of numbers near 1: gradients can be too small for those of their own, in FP32.
    unit = magnitude.amax().clamp(min=LEAST_SCALE)
    estimated = [
        ((data == 0) & (exact != 0)).sum(),
        (magnitude > tile_scale * (format.largest * (1 + ROUNDING))).sum(),
        finite.sum(),
        (exact / unit).square().sum(dtype=torch.float64) * unit.double().square(),
        (error / unit).square().sum(dtype=torch.float64) * unit.double().square(),
    ]
    tiles = (~torch.isfinite(scale)).sum().double()
    return torch.stack([*(value.double() * step for value in estimated), tiles])


def _maxima(x: torch.Tensor, quantized: QTensor, scale: torch.Tensor) -> torch.Tensor:
    """`MAXIMA` of a tensor, FP32; an infinite `amax` stands for one that is not finite."""
    least, most = torch.aminmax(x)  # makes no copy, unlike abs
    amax = torch.maximum(-least, most).float()
    used = _holds_numbers(quantized) & torch.isfinite(scale)
    highest = torch.where(used, scale, 0.0).amax().log2()
    lowest = -torch.where(used, scale, math.inf).amin().log2()
    return torch.stack([amax.nan_to_num(nan=math.inf), highest, lowest])


def _holds_numbers(quantized: QTensor) -> torch.Tensor:
    """Bool [..., r, c]: not all elements of the tile are zero (the scale does not tell)."""
    (high, wide), (rows, columns) = quantized.format.tile, quantized.shape[-2:]
    high, wide = high or rows, wide or columns
    magnitudes = quantized.data.view(torch.uint8) & 0x7F
    padded = F.pad(magnitudes, (0, -columns % wide, 0, -rows % high))
    return padded.unflatten(-1, (-1, wide)).amax(-1).unflatten(-2, (-1, high)).amax(-2) > 0


def _metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    elements = sums["elements"] or math.nan
    return {
        "underflow": sums["underflow"] / elements,
        "saturation": sums["saturation"] / elements,
        "amax": maxima["amax"],
        # Where all tiles hold zeros, both are −∞.
        "scale_spread": max(0.0, maxima["highest"] + maxima["lowest"]),
        "snr_db": _decibels(sums["signal"], sums["noise"]),
        "non_finite_tiles": sums["non_finite_tiles"],
    }


def _decibels(signal: float, noise: float) -> float:
    if signal and noise:
        return 10 * math.log10(signal / noise)
    return -math.inf if noise else math.inf
