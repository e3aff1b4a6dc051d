"""What the backward pass forms again instead of keeping it: cheap functions whose outputs are large.

A function marked by `recomputed` runs as always. Inside a `Recomputing` scope, whatever keeps one of its outputs for
the backward pass (a product keeps its operand, attention its queries) keeps the function and its inputs instead, and
forms the output again when it is asked for it. Nothing else runs twice, unlike under torch.utils.checkpoint, which
repeats all that lies between a region's inputs and outputs. DeepSeek-V3, section 3.2.3.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

KINDS = ("norm", "up_projection", "swiglu")
"""What models mark: norms, the expansion of attention's latents, activations."""

_local = threading.local()


def is_recomputing() -> bool:
    """Whether this is a second time: what counts or watches must not do so again."""
    return getattr(_local, "again", False)


@contextmanager
def second_time() -> Iterator[None]:
    """Everything inside is a repetition (`is_recomputing`)."""
    before, _local.again = is_recomputing(), True
    try:
        yield
    finally:
        _local.again = before


class _Recipe:
    """A function, its inputs, and for a while its outputs, formed again for all who keep one of them."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.kept = 0
        self._taken = 0
        self._outputs: tuple[torch.Tensor, ...] = ()

    def take(self, number: int) -> torch.Tensor:
        if not self._outputs:
            inputs = [x.unpack() if isinstance(x, _Kept) else x for x in self.inputs]
            with torch.no_grad(), second_time(), _scope(None):
                self._outputs = _tuple(self.function(*inputs))
        output = self._outputs[number]
        self._taken += 1
        if self._taken >= self.kept:
            self._taken, self._outputs = 0, ()
        return output


class _Kept(NamedTuple):
    """In place of a tensor: a view of the storage of a recipe's output."""

    recipe: _Recipe
    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> torch.Tensor:
        return self.recipe.take(self.number).as_strided(self.shape, self.stride, self.offset)


class Recomputing:
    """A scope, one block of a model wide: its outputs of marked functions are held until the scope ends."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        # By address, which no other tensor can have as long as the output is held here.
        self._outputs: dict[int, tuple[torch.Tensor, int, _Recipe, int]] = {}

    def __enter__(self) -> None:
        self._before = getattr(_local, "scope", None)
        _local.scope = self
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        _local.scope = self._before
        self._outputs.clear()

    def run(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """`function(*inputs)`, whose outputs are known by their storage from now on."""
        result = function(*inputs)
        recipe = _Recipe(function, [self._pack(x.detach()) if isinstance(x, torch.Tensor) else x for x in inputs])
        theirs = {_place(x) for x in inputs if isinstance(x, torch.Tensor)}
        for index, output in enumerate(_tuple(result)):
            if output.numel() and _place(output) not in theirs:
                self._outputs[_place(output)] = (output, output._version, recipe, index)
        return result

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        if not tensor.numel() or type(tensor) is not torch.Tensor or not self._outputs:
            return tensor
        _, version, recipe, index = self._outputs.get(_place(tensor), (None, None, None, 0))
        if recipe is None or version != tensor._version:
            return tensor
        recipe.kept += 1
        return _Kept(recipe, index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def recomputed(kind: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`: a tensor or a tuple of them, which the backward pass may form again from the inputs.

    Args:
        kind: one of `KINDS`; a scope says which it takes.
        function: without effects but its result, the same bits every time; parameters that it reads besides `inputs`
            must be there in the backward pass, as those of the module that is being differentiated are.
    """
    scope = getattr(_local, "scope", None)
    if scope is None or kind not in scope.kinds or not torch.is_grad_enabled():
        return function(*inputs)
    return scope.run(function, inputs)


@contextmanager
def _scope(scope: Recomputing | None) -> Iterator[None]:
    before, _local.scope = getattr(_local, "scope", None), scope
    try:
        yield
    finally:
        _local.scope = before


def _unpack(kept: torch.Tensor | _Kept) -> torch.Tensor:
    return kept.unpack() if isinstance(kept, _Kept) else kept


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
