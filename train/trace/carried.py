"""Fake tensors that know the numbers that the host reads: how many rows go where.

Under torch's `FakeTensorMode` a tensor has shape, dtype and device, and no values. Sizes of exchanges are values. So
integer tensors whose values are known carry them along, as CPU tensors, through every operator. Memory that nobody has
written yet is carried too, so that what is written into a view of it is seen through the others, but is not known.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map

from octofold.backends.errors import UserError

_VALUE = "_octofold_value"
_UNWRITTEN = "_octofold_unwritten"
"""Attribute of a value's storage."""
MOST = 1 << 24
"""Numbers in a tensor that carries its value."""
_EMPTY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_WHOLE = {"aten::copy_", "aten::zero_", "aten::fill_"}
"""Operators that write everything they are given to write into."""


def value_of(tensor: Tensor) -> Tensor | None:
    """What a fake tensor is known to hold; a tensor that is not fake is its own value."""
    value = _carried(tensor)
    return None if value is None or getattr(value.untyped_storage(), _UNWRITTEN, False) else value


def carry(tensor: Tensor, value: Tensor) -> None:
    """Let a fake tensor carry its value, a CPU tensor of its shape and dtype."""
    assert tensor.shape == value.shape, f"{tensor.shape} carries {value.shape}"
    assert tensor.dtype == value.dtype, f"{tensor.dtype} carries {value.dtype}"
    setattr(tensor, _VALUE, value)


def write(tensor: Tensor, value: Tensor | None) -> None:
    """What something beside operators has written into a fake tensor, seen through all views of its memory.

    Args:
        value: None: not known.
    """
    memory = _carried(tensor)
    if memory is None:
        return
    with unset_fake_temporarily():
        if value is not None:
            memory.copy_(value.view(memory.shape))
        setattr(memory.untyped_storage(), _UNWRITTEN, value is None)


def read(tensor: Tensor) -> Any:
    """The number that the host reads: what is carried.

    Of what nobody knows, a floating-point number is 1, and a truth is false: kernels ask whether something overflows.

    Raises:
        UserError: an integer that is not known, which would decide what is computed.
    """
    value = value_of(tensor)
    if value is not None:
        with unset_fake_temporarily():
            return value.item()
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return 1.0 if tensor.is_floating_point() else False
    rule = "without values, only numbers that follow from the routing of tokens can be read"
    raise UserError(f"a trace reads a number of {tensor.dtype}\n  rule:   {rule}\n  remedy: another layout or kernel")


def propagate(func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> None:
    """Let the results of an operator carry theirs, where its arguments do."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    outputs = [x for x in tree_flatten(results)[0] if isinstance(x, Tensor)]
    if any(isinstance(x, torch.UntypedStorage) for x in flat):
        return
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    name = func._schema.name
    # Views and memory are carried, known or not.
    memory = name in _EMPTY or (not any(written) and any(r.alias_info is not None for r in func._schema.returns))
    whole = name in _WHOLE
    into = tensors[:1] if whole else []
    needed = [x for x in tensors if not any(x is y for y in into)]
    found = [_carried(x) if memory and name not in _EMPTY else value_of(x) for x in needed]
    if name in _EMPTY:
        found = []
    if all(value is not None for value in found) and (found or _are_counts(outputs)):
        if whole and _carried(into[0]) is None:
            return
        real_args, real_kwargs = tree_map(_real, (args, kwargs))
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        with unset_fake_temporarily():
            values = func(*real_args, **real_kwargs)
        reals = [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]
        for output, real in zip(outputs, reals, strict=True):
            if not real.is_floating_point() and real.numel() <= MOST:
                carry(output, real)
                if name in _EMPTY or whole:
                    setattr(real.untyped_storage(), _UNWRITTEN, name in _EMPTY)
        return
    for is_written, given in zip(written, args, strict=False):
        for tensor in ([given] if isinstance(given, Tensor) else given) if is_written else []:
            write(tensor, None)


def _carried(tensor: Tensor) -> Tensor | None:
    """The memory that stands for a tensor's, known or not."""
    if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
        with unset_fake_temporarily():
            return tensor.cpu()
    return getattr(tensor, _VALUE, None)


def _are_counts(outputs: list[Tensor]) -> bool:
    """Of an operator that makes tensors of nothing: may the host want to read what becomes of them?"""
    return bool(outputs) and all(not x.is_floating_point() and x.numel() <= MOST for x in outputs)


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    carried = _carried(value)
    # Only its shape is asked for.
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if carried is None else carried
