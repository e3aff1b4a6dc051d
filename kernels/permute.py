"""The order of token copies around experts: sorted by expert on the way there, by token on the way back.

T tokens, K experts a token, N = T·K copies.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """A permutation of the N copies: copy number t·K + k of token t stands at `inverse_N[t·K + k]`."""

    sorted_N: torch.Tensor
    inverse_N: torch.Tensor

    @staticmethod
    def by_expert(experts_N: torch.Tensor) -> "Order":
        """Copies sorted by expert, ties in token order. `experts_N`: int64 [N]."""
        sorted_N = torch.argsort(experts_N, stable=True)
        inverse_N = torch.empty_like(sorted_N)
        inverse_N[sorted_N] = torch.arange(len(sorted_N), device=sorted_N.device)
        return Order(sorted_N, inverse_N)

    @property
    def inverse(self) -> "Order":
        """The permutation that undoes this one."""
        return Order(self.inverse_N, self.sorted_N)
