"""The providers of kernels/npu/ beside the reference: errors in units of the dtype's precision, and shapes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from octofold.backends.dotted import load_dotted
from octofold.kernels.permute import Order
from octofold.kernels.registry import PROVIDERS

GATES = [("softmax", 1, 1, 1), ("softmax", 4, 2, 1), ("sigmoid", 1, 1, 1), ("sigmoid", 4, 2, 2)]
"""Score function, groups of experts, groups that are kept, experts that a group is judged by."""
Case = tuple[str, list[Tensor], dict[str, Any]]
"""Name, floating operands, and what else the op is given."""


def _op(name: str, provider: str) -> Callable[..., Tensor]:
    op = load_dotted(f"{PROVIDERS[name][provider]}:{name}", "test")
    assert callable(op)
    return op


def _attention_cases() -> Iterator[Case]:
    """Sequences, heads, queries, positions, widths of keys and values, ids of documents."""
    shapes: list[tuple[int, int, int, int, int, int, list[list[int]] | None]] = [
        (1, 1, 1, 1, 24, 16, None),
        (2, 3, 7, 7, 24, 16, None),
        (2, 2, 3, 9, 24, 16, None),
        (1, 2, 5, 5, 8, 12, None),
        (2, 3, 7, 7, 24, 16, [[0, 0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1]]),
        (2, 2, 3, 9, 24, 16, [[0, 0, 0, 1, 1, 1, 1, 2, 2], [4] * 9]),
        (1, 2, 130, 130, 192, 128, [[0] * 100 + [1] * 29 + [2]]),
    ]
    for batch, heads, queries, length, width, value_width, documents in shapes:
        ids = {} if documents is None else {"doc_ids_BS": torch.tensor(documents)}
        q = torch.randn(batch, heads, queries, width)
        k, v = torch.randn(batch, heads, length, width), torch.randn(batch, heads, length, value_width)
        name = f"attention {list(q.shape)} {length} {value_width} {'documents' if documents else ''}".strip()
        yield name, [q, k, v], {"scale": width**-0.5, **ids}


def _cases() -> Iterator[Case]:
    for shape in [(1, 7), (5, 33), (2, 3, 64), (16,)]:
        yield f"rms_norm {shape}", [torch.randn(shape), torch.randn(shape[-1])], {"eps": 1e-6}
    for batch, length, heads, width in [(1, 1, 1, 2), (2, 5, 3, 6), (1, 3, 1, 64)]:
        angles = torch.randn(batch, length, width // 2)
        tables = {"cos_BSc": angles.cos(), "sin_BSc": angles.sin()}
        yield f"rotary {batch, length, heads, width}", [torch.randn(batch, length, heads, width)], tables
    for shape in [(1, 2), (5, 66), (2, 3, 64)]:
        yield f"swiglu {shape}", [torch.randn(shape)], {}
    for counts in [[0, 3, 0, 5], [1], [0, 0], [7, 0]]:
        x, weight = torch.randn(sum(counts), 13), torch.randn(len(counts), 5, 13)
        yield f"grouped_mm {counts}", [x, weight], {"counts_E": torch.tensor(counts)}
    for tokens, copies in [(1, 1), (1, 3), (7, 2), (9, 1), (0, 2)]:
        order = Order.by_expert(torch.randint(0, 4, (tokens * copies,)))
        yield f"permute {tokens} {copies}", [torch.randn(tokens, 5)], {"order": order, "copies": copies}
        rows, weights = torch.randn(tokens * copies, 5), torch.rand(tokens, copies)
        yield f"unpermute {tokens} {copies}", [rows, weights], {"order": order}
    for scoring, groups, kept, best in GATES:
        rules = {"k": 3, "scoring": scoring, "groups": groups, "kept_groups": kept, "best": best}
        yield f"gate_topk {scoring} {groups}", [torch.randn(7, 12)], {"bias_E": torch.randn(12), **rules}
        yield f"gate_topk {scoring} {groups} plain", [torch.randn(7, 12)], {"bias_E": None, **rules}
    yield from _attention_cases()


def _to_npu(value: Any) -> Any:
    if isinstance(value, Order):
        return Order(value.sorted_N.to("npu"), value.inverse_N.to("npu"))
    return value.to("npu") if isinstance(value, Tensor) else value


def _outcome(op: Callable[..., Tensor], inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Result and gradients. Of a gate the result is the scores."""
    out = op(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    cotangent = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def _roundings(case: Case, dtype: torch.dtype) -> list[float]:
    """Of the result and of each gradient: how far from the reference in FP64."""
    name, operands, options = case
    # Weights of experts stay FP32.
    kept = [x.to(torch.float32 if name.startswith("unpermute") and i else dtype) for i, x in enumerate(operands)]
    there = [x.to("npu").requires_grad_() for x in kept]
    found = _outcome(_op(name.split()[0], "npu"), there, {key: _to_npu(value) for key, value in options.items()})
    # What is rounded to the dtype by contract: tables of angles, and below the weights of experts.
    options = {key: x.to(dtype) if key.endswith("_BSc") else x for key, x in options.items()}
    here = [x.double().requires_grad_() for x in kept]
    if name.startswith("unpermute"):
        here[1] = kept[1].to(dtype).double().requires_grad_()
    errors = []
    for near, exact in zip(found, _outcome(_op(name.split()[0], "reference"), here, options), strict=True):
        assert near.shape == exact.shape, name
        assert near.device.type == "npu", name
        if exact.numel():
            size = max(1.0, float(exact.square().mean().sqrt()))
            error = float((near.cpu().double() - exact).square().mean().sqrt())
            errors.append(error / size / torch.finfo(dtype).eps)
    return errors


def roundings() -> dict[str, list[float]]:
    """Every case in BF16 (a gate computes in FP32), and in FP32 where the provider takes it."""
    torch.manual_seed(0)
    found = {}
    for case in _cases():
        if "gate" not in case[0]:
            found[f"{case[0]} bfloat16"] = _roundings(case, torch.bfloat16)
        if "permute" not in case[0]:
            found[f"{case[0]} float32"] = _roundings(case, torch.float32)
    return found


def many_documents() -> list[float]:
    """More documents than one call takes."""
    from octofold.kernels.npu import attention

    attention.DOCUMENTS = 2
    torch.manual_seed(0)
    documents = torch.tensor([[0, 1, 1, 2, 3, 3, 4], [0, 0, 1, 2, 3, 4, 5]])
    q, k, v = torch.randn(2, 2, 5, 24), torch.randn(2, 2, 7, 24), torch.randn(2, 2, 7, 16)
    return _roundings(("attention", [q, k, v], {"scale": 0.2, "doc_ids_BS": documents}), torch.float32)


def choices() -> list[bool]:
    """Whether gates choose the experts that the reference chooses, among as many groups as DeepSeek-V3's."""
    torch.manual_seed(0)
    same = []
    for scoring, groups, kept, best in [*GATES, ("sigmoid", 8, 4, 2)]:
        logits, bias = torch.randn(50, 32 * groups), torch.randn(32 * groups) * 0.1
        rules = {"k": 8, "scoring": scoring, "groups": groups, "kept_groups": kept, "best": best}
        _, expected = _op("gate_topk", "reference")(logits, bias, **rules)
        _, found = _op("gate_topk", "npu")(logits.to("npu").requires_grad_(), bias.to("npu"), **rules)
        assert (found.dtype, found.requires_grad) == (torch.int64, False)
        same.append(torch.equal(found.cpu().sort(1).values, expected.sort(1).values))
    return same


def fakes() -> dict[str, bool]:
    """Whether results and gradients on fake tensors, by torch_npu's meta kernels, have the shapes of the operands'."""
    found = {}
    for name, operands, options in _cases():
        if "doc_ids_BS" in options or not all(x.numel() for x in operands):
            continue  # Ids of documents are read.
        real = _outcome(_op(name.split()[0], "reference"), [x.requires_grad_() for x in operands], options)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:

            def faked(value: Any, mode: FakeTensorMode = mode) -> Any:
                if isinstance(value, Order):
                    return Order(faked(value.sorted_N), faked(value.inverse_N))
                if not isinstance(value, Tensor):
                    return value
                return torch.empty(value.shape, dtype=value.dtype, device="npu")

            dtype = torch.float32 if "gate" in name else torch.bfloat16
            inputs = [torch.empty(x.shape, dtype=dtype, device="npu", requires_grad=True) for x in operands]
            out = _op(name.split()[0], "npu")(*inputs, **{key: faked(value) for key, value in options.items()})
            out = out[0] if isinstance(out, tuple) else out
            results = [out, *torch.autograd.grad(out, inputs, torch.empty_like(out))]
        found[name] = [(x.shape, x.device.type) for x in results] == [(x.shape, "npu") for x in real]
    return found


def illegal() -> list[str]:
    """What torch_npu says of arguments that its operators do not take."""
    npu, told = torch.ops.npu, []
    with FakeTensorMode():
        x, weight = torch.empty(4, 8, device="npu"), torch.empty(2, 8, 3, device="npu")
        sizes, places = torch.empty(2, dtype=torch.int64, device="npu"), torch.empty(4, 1, 1, device="npu")
        calls = [
            lambda: npu.npu_grouped_matmul([x], [weight], group_list=sizes, group_type=1, split_item=3),
            lambda: npu.npu_moe_token_permute(x[None], places[:, 0]),
            lambda: npu.npu_moe_token_permute(x, places),
            lambda: npu.npu_moe_token_unpermute(x, places[:, 0]),
        ]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                told.append(str(error))
    return told
