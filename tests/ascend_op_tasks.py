"""torch_npu's operators on the software NPU beside what they should compute. Results are relative errors, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Callable[..., Tensor]
npu = torch.ops.npu


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def _compare(op: Formula, formula: Formula, *inputs: Tensor) -> list[float]:
    """Errors of the result and of every gradient, against the formula in FP64."""
    there = [tensor.to("npu").requires_grad_() for tensor in inputs]
    here = [tensor.double().requires_grad_() for tensor in inputs]
    found, expected = op(*there), formula(*here)
    cotangent = torch.randn(expected.shape)
    found.backward(cotangent.to("npu"))
    expected.backward(cotangent.double())
    gradients = zip((x.grad for x in there), (x.grad for x in here), strict=True)
    return [_error(found.detach(), expected.detach()), *(_error(a, b) for a, b in gradients if a is not None)]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By complex multiplication: pairs are (i, i + half)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat([turned.real, turned.imag], -1)


def operators() -> dict[str, list[float]]:
    """Each operator, forward and backward."""
    torch.manual_seed(0)
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    x, gamma = torch.randn(6, 16), torch.rand(16) + 0.5
    found = {
        "rms_norm": _compare(
            lambda x, g: npu.npu_rms_norm(x, g, 1e-6)[0], lambda x, g: F.rms_norm(x, (16,), g, 1e-6), x, gamma
        ),
        "swiglu": _compare(npu.npu_swiglu, lambda x: x[:, :8].sigmoid() * x[:, :8] * x[:, 8:], x),
    }
    angles = torch.randn(1, 6, 1, 8).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    q = torch.randn(1, 6, 2, 16)
    found["rotary_mul"] = _compare(
        lambda q: npu.npu_rotary_mul(q, cos.to("npu"), sin.to("npu")),
        lambda q: _rotated(q, cos.double(), sin.double()),
        q,
    )
    experts = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2], [1, 0]])
    order = experts.flatten().argsort(stable=True)
    found["token_permute"] = _compare(
        lambda x: npu.npu_moe_token_permute(x, experts.to("npu"))[0], lambda x: x[order // 2], x
    )
    weight, sizes = torch.randn(3, 16, 4), torch.tensor([2, 0, 4])
    arguments = {"group_list": sizes.to("npu"), "split_item": 3, "group_list_type": 1}
    rows = npu.npu_grouped_matmul([x.to("npu")], [weight.to("npu")], group_type=0, **arguments)[0]
    expected = torch.cat([x[:2].double() @ weight[0].double(), x[2:].double() @ weight[2].double()])
    inner = npu.npu_grouped_matmul([x.t().to("npu")], [rows], group_type=2, **arguments)[0]
    parts = [x[:2].double().t() @ expected[:2], torch.zeros(16, 4).double(), x[2:].double().t() @ expected[2:]]
    found["grouped_matmul"] = [_error(rows, expected), _error(inner, torch.stack(parts))]
    return found


def unknown() -> list[str]:
    """What an argument, and an operator, without a kernel say."""
    x, weight = torch.ones(2, 4, device="npu"), torch.ones(1, 4, 4, device="npu")
    calls = [
        lambda: npu.npu_grouped_matmul([x], [weight], group_list=torch.tensor([2], device="npu"), split_item=0),
        lambda: npu.npu_moe_gating_top_k_softmax_v2(torch.ones(2, 8, device="npu"), k=2),
    ]
    told = []
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            told.append(str(error))
    return told
