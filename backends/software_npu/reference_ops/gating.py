"""npu_moe_gating_top_k, forward. Legend: T tokens, E experts, K experts a token, G groups of experts."""

import torch
from torch import Tensor

from octofold.backends.software_npu.reference_ops.support import Kernels, unknown

MOST, LANES = 2048, 32


def gating_top_k(
    x_TE: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the chosen [T, K], their experts, int32, and FP32 scores of all [T, E] (`out_flag`).

    `norm_type`: 0 softmax, 1 sigmoid, whose weights are normalised. `group_select_mode`: a group counts as its best
    expert, or 1: the sum of its best two.
    """
    if renorm or input_ids is not None or tid2eid is not None or norm_type not in (0, 1):
        raise unknown("npu_moe_gating_top_k", f"renorm={renorm} norm_type={norm_type}")
    size = x_TE.shape[1] // group_count
    padded = -(-size // LANES) * LANES * group_count
    legal = x_TE.dim() == 2 and x_TE.shape[1] % group_count == 0 and size > 2 and padded <= MOST
    if not legal or not 1 <= k <= size * k_group or (bias is not None and bias.dtype != x_TE.dtype):
        shown = f"x {list(x_TE.shape)} {x_TE.dtype} k={k} k_group={k_group} group_count={group_count}"
        raise unknown("npu_moe_gating_top_k", shown)
    exact_TE = x_TE.float()
    scores_TE = exact_TE.softmax(-1) if norm_type == 0 else exact_TE.sigmoid()
    biased_TE = scores_TE if bias is None else scores_TE + bias.float()
    in_groups_TGe = biased_TE.unflatten(1, (group_count, -1))
    worth_TG = in_groups_TGe.topk(1 + group_select_mode, -1).values.sum(-1)
    outside_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, worth_TG.topk(k_group, -1).indices, False)
    allowed_TE = in_groups_TGe.masked_fill(outside_TG[..., None], float("-inf")).flatten(1)
    experts_TK = allowed_TE.topk(k, -1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if norm_type == 1:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + eps)
    weights_TK = (weights_TK * routed_scaling_factor).to(x_TE.dtype)
    return weights_TK, experts_TK.to(torch.int32), scores_TE if out_flag else scores_TE.new_empty(0)


KERNELS: Kernels = {"npu_moe_gating_top_k": gating_top_k}
