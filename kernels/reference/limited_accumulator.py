"""A model of the sums inside Hopper's FP8 tensor cores, for studies of what their precision costs. Slow.

As DeepSeek-V3 describes them (sections 3.3.2 and 3.5.2): 32 products at a time are aligned to the largest of them and
of the running sum, 14 bits of each are kept and the rest is cut off. Every `PROMOTE_EVERY` terms the sum is multiplied
by its scales and added to an FP32 accumulator outside, the remedy of section 3.3.2.
"""

import torch

from octofold.kernels.qtensor import QTensor, spread

TERMS_AT_ONCE = 32
KEPT_BITS = 14
PROMOTE_EVERY = 128


def limited_mm(a: QTensor, b: QTensor, *, promote_every: int = PROMOTE_EVERY) -> torch.Tensor:
    """a bᵀ in FP32, [M, N]; arguments as in `scaled_mm`.

    Args:
        promote_every: terms between promotions, a multiple of 32 that divides the length of a tile (or the other way
            round); 0: never, which wants one scale a row.
    """
    (rows, terms), columns = a.shape, b.shape[0]
    a_MK, b_NK = a.data.float(), b.data.float()
    scale_a = spread(a.scale.float(), a.format.tile, a.shape).expand(rows, terms)
    scale_b = spread(b.scale.float(), b.format.tile, b.shape).expand(columns, terms)
    # Tiles shorter than a promotion have to be promoted at their ends.
    widths = [wide for wide in (a.format.tile[1], b.format.tile[1]) if wide]
    every = min([promote_every or terms, *widths]) or 1
    out = torch.zeros(rows, columns, device=a.data.device)
    for first in range(0, terms, every):
        inner = torch.zeros_like(out)
        for start in range(first, min(first + every, terms), TERMS_AT_ONCE):
            end = min(start + TERMS_AT_ONCE, first + every, terms)
            inner = _aligned_sum(inner, a_MK[:, None, start:end] * b_NK[None, :, start:end])
        out += inner * scale_a[:, first, None] * scale_b[None, :, first]
    return out


def _aligned_sum(inner: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The running sum [M, N] plus products [M, N, k], each cut to `KEPT_BITS` bits below the largest exponent."""
    terms = torch.cat([products, inner[..., None]], dim=-1)
    _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))
    quantum = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - KEPT_BITS)
    return _cut(((terms / quantum).trunc() * quantum).sum(-1))


def _cut(value: torch.Tensor) -> torch.Tensor:
    """A sum as a register of `KEPT_BITS` bits holds it."""
    _, exponent = torch.frexp(value)
    quantum = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - KEPT_BITS)
    return (value / quantum).trunc() * quantum
