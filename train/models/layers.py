"""Parts that every layer uses: linear layer, embedding, norm, dense feed-forward network, residual. D hidden width.

What may be in FP8 has a slot for it, named in `FP8_SLOTS` (its name below the module's -> attribute); the precision
policy (train/precision/apply.py) fills it. What has an attribute `later` computes its weight's gradient when a pipeline
asks for it, if the pipeline gives it a queue (kernels/weight_gradients.py).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from octofold.kernels.fp8 import Fp8State
from octofold.kernels.recompute import recomputed
from octofold.kernels.registry import Kernels
from octofold.kernels.weight_gradients import WeightGradients, linear
from octofold.parallel.apply import local
from octofold.parallel.sequence import WholeSequence


class Linear(nn.Linear):
    """x wᵀ, in FP8 where the policy says so."""

    FP8_SLOTS: ClassVar[dict[str, str]] = {"": "fp8"}

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fp8: Fp8State | None = None
        self.later: WeightGradients | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        weight = local(self.weight)
        return linear(x, weight, self.later) if self.fp8 is None else self.fp8.linear(x, weight)


class Embedding(nn.Embedding):
    """Rows of a table, as FP8 would keep them where the policy says so."""

    FP8_SLOTS: ClassVar[dict[str, str]] = {"": "fp8"}

    def __init__(self, entries: int, width: int) -> None:
        super().__init__(entries, width)
        self.fp8: Fp8State | None = None
        self.sequence = WholeSequence()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [B, Q] to [B, P, D] (parallel/sequence.py)."""
        rows = self.sequence.lookup(tokens, local(self.weight))
        return rows if self.fp8 is None else self.fp8.stored(rows)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return recomputed("norm", self.compute, x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The norm itself, which may be compiled (parallel/compile.py)."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU network: down(silu(gate x) · up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.kernels = kernels
        self.sequence = WholeSequence()

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """[B, P, D] to [B, P, D] (parallel/sequence.py)."""
        gate_up, down = self._gate_up(self.sequence.enter(x_BPD)), self.down_proj
        if down.fp8 is not None:
            return self.sequence.leave(down.fp8.swiglu_linear(gate_up, local(down.weight)))
        return self.sequence.leave(down(recomputed("swiglu", self.kernels.swiglu, gate_up)))

    def _gate_up(self, x: torch.Tensor) -> torch.Tensor:
        """Both projections: [..., 2·I]."""
        gate, up = self.gate_proj, self.up_proj
        joined = torch.cat([local(gate.weight), local(up.weight)]) if can_join(gate, up) else None
        if joined is None:
            return torch.cat([gate(x), up(x)], dim=-1)
        # One product with both weights: joining weights copies less than joining activations.
        return linear(x, joined, gate.later) if gate.fp8 is None else gate.fp8.linear(x, joined)


def can_join(first: Linear, second: Linear) -> bool:
    """Whether one product with both weights computes what two would: alike in precision, and no tile spans both."""
    if first.fp8 is None or second.fp8 is None:
        return first.fp8 is second.fp8
    recipe, other = first.fp8.recipe, second.fp8.recipe
    high, turned = recipe.weight.tile[0], recipe.turned_weight.tile[1]
    rows = local(first.weight).shape[0]
    return recipe == other and all(size and rows % size == 0 for size in (high, turned))


class SumResidual:
    """The plain residual: the stream is [B, S, D], and a branch's output is added to it.

    The seam for other kinds (several streams, mixed before and after each branch): a kind says how the stream begins,
    how a branch reads and writes it, and how it ends.
    """

    def begin(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The stream from the embeddings."""
        return x_BSD

    def join(self, stream: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The stream after a branch, which maps [B, S, D] to [B, S, D]."""
        return stream + branch(stream)

    def end(self, stream: torch.Tensor) -> torch.Tensor:
        """[B, S, D] for the final norm."""
        return stream
