"""Grouped product over uneven expert groups: the specification.

N rows, E experts, D input width, F output width.
"""

import torch

from octofold.kernels.registry import Workload


def why_unsupported(workload: Workload) -> str | None:
    """Any device, any dtype."""
    return None


def grouped_mm(x_ND: torch.Tensor, w_EFD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Rows of x, sorted by expert, each times the transposed matrix of its expert.

    Args:
        x_ND: rows sorted by expert.
        w_EFD: one [F, D] matrix for each expert, dtype of x.
        counts_E: int64, rows of each expert, zero allowed; they add up to N.

    Returns:
        [N, F].
    """
    groups = x_ND.split(counts_E.tolist())
    return torch.cat([group @ w_EFD[expert].t() for expert, group in enumerate(groups)])
