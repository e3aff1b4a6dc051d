"""Scores and choice of a gate by npu_moe_gating_top_k; the gradient is that of the scores, which it hands out.

torch_npu's own gradient is for the sigmoid gate alone, goes through the weights of the chosen, so that balance losses
would need the scores a second time, and has no meta kernel.
"""

from typing import Any

import torch

from octofold.kernels.npu.support import why_no_npu
from octofold.kernels.registry import Workload

EXPERTS = 2048
"""Most that the operator takes, each group rounded up to a multiple of `LANES`."""
LANES = 32
GROUP = 3
"""Fewest experts of a group."""


def why_unsupported(workload: Workload) -> str | None:
    """Ascend, but in FP64, with as many experts and as large groups as the operator takes."""
    if reason := why_no_npu(workload):
        return reason
    if not workload.experts:
        return None
    size = workload.experts // workload.expert_groups
    if size < GROUP:
        return f"groups have at least {GROUP} experts, not {size}"
    padded = -(-size // LANES) * LANES * workload.expert_groups
    return f"at most {EXPERTS} experts, groups padded to {LANES}: {padded}" if padded > EXPERTS else None


class _GateTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, is_softmax: bool, options: dict[str, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, experts_TK, scores_TE = torch.ops.npu.npu_moe_gating_top_k(
            logits_TE, bias=bias_E, norm_type=0 if is_softmax else 1, out_flag=True, **options
        )
        experts_TK = experts_TK.long()
        ctx.is_softmax = is_softmax
        ctx.save_for_backward(scores_TE)
        ctx.mark_non_differentiable(experts_TK)
        return scores_TE, experts_TK

    @staticmethod
    def backward(ctx: Any, d_scores_TE: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        (scores_TE,) = ctx.saved_tensors
        if ctx.is_softmax:
            d_logits_TE = torch.ops.aten._softmax_backward_data(d_scores_TE, scores_TE, -1, scores_TE.dtype)
        else:
            d_logits_TE = torch.ops.aten.sigmoid_backward(d_scores_TE, scores_TE)
        return d_logits_TE, None, None, None


def gate_topk(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    *,
    k: int,
    scoring: str,
    groups: int = 1,
    kept_groups: int = 1,
    best: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/reference/gate_topk.py, in FP32."""
    options = {"k": k, "group_count": groups, "k_group": kept_groups, "group_select_mode": best - 1}
    scores_TE, experts_TK = _GateTopK.apply(logits_TE, bias_E, scoring == "softmax", options)
    return scores_TE, experts_TK
