"""How a linear layer computes in FP8: the format of each operand of its three products.

A layer y = x wᵀ, x [M, K], w [N, K], has the products forward y = x wᵀ (sums over K), input gradient dx = dy w (over N)
and weight gradient dw = dyᵀ x (over M). Each operand is quantised along what its product sums over.
"""

from dataclasses import dataclass

import torch

from octofold.kernels.qtensor import E4M3, PUBLISHED_LEAST_AMAX, Format

MX_TILE = 32


@dataclass(frozen=True)
class Recipe:
    """Formats and choices of one layer."""

    name: str
    activation: Format
    """Of x, for the forward product."""
    weight: Format
    """Of w, for the forward product."""
    gradient: Format
    """Of dy, for the input gradient."""
    inner_activation: Format
    """Of xᵀ [K, M], for the weight gradient."""
    inner_gradient: Format
    """Of dyᵀ [N, M], for the weight gradient."""
    turned_weight: Format
    """Of wᵀ [K, N], for the input gradient."""
    saves_fp8: bool = True
    """x is kept for the backward pass as it was quantised for the forward product, else in BF16."""
    accumulation: str = "fp32"
    arithmetic: str = "product"
    """product: quantised operands are multiplied; storage: BF16 products, only what is kept is quantised."""
    delayed: bool = False
    """One scale a tensor, from the largest magnitudes of past steps."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """All there are."""
        return (
            self.activation,
            self.weight,
            self.gradient,
            self.inner_activation,
            self.inner_gradient,
            self.turned_weight,
        )


def block_recipe(name: str, block: int, scale: str, gradient_dtype: torch.dtype, **choices: object) -> Recipe:
    """DeepSeek-V3's (section 3.3.2): tiles of `block` numbers along the sum, square blocks of weights."""
    tile, square = (1, block), Format((block, block), scale, least_amax=PUBLISHED_LEAST_AMAX)
    x, dy = Format(tile, scale), Format(tile, scale, gradient_dtype)
    return Recipe(name, x, square, dy, x, dy, square, **choices)  # type: ignore[arg-type]


def mx_recipe(name: str, gradient_dtype: torch.dtype, **choices: object) -> Recipe:
    """OCP microscaling: 32 numbers along the sum share a power of two, weights too (so they are quantised twice)."""
    x, dy = Format((1, MX_TILE)), Format((1, MX_TILE), dtype=gradient_dtype)
    return Recipe(name, x, x, dy, x, dy, x, **choices)  # type: ignore[arg-type]


def tensor_recipe(name: str, scale: str, gradient_dtype: torch.dtype, **choices: object) -> Recipe:
    """One scale for each tensor: of each expert's weights, but of all experts' together where it is delayed."""
    x, dy = Format((0, 0), scale, E4M3), Format((0, 0), scale, gradient_dtype)
    return Recipe(name, x, x, dy, x, dy, x, **choices)  # type: ignore[arg-type]
