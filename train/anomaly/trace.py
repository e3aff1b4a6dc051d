"""What every module made of a step's forward and backward passes: whether it is finite, its bits, which sequences.

Hooks stand on modules going forward and, going back, on the nodes of autograd's graph, each of which belongs to the
innermost module that made it. They look and change nothing. It costs several times a step, so that it is done to a step
that is in question, and not to others.

B sequences of a micro-batch, A micro-batches of a step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from octofold.kernels.recompute import is_recomputing
from octofold.train.anomaly.bits import checksum, is_finite
from octofold.train.anomaly.events import BACKWARD, FORWARD, Event, Sequences, Traced


class Trace:
    """Watches a model between `__enter__` and `__exit__`; then `traced` holds what it saw."""

    def __init__(self, stages: Mapping[int, nn.Module], blocks: Collection[str]) -> None:
        """
        Args:
            stages: by number, what a forward pass of is a micro-batch: the stages of a pipeline, or the model as 0.
            blocks: names of the modules whose outputs keep sequences apart, [B, …].
        """
        self.traced = Traced()
        self._stages, self._blocks = dict(stages), set(blocks)
        self._micro = 0
        self._passes: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._nodes: dict[Any, None] = {}
        self._facts: list[tuple[tuple[str, str, str, int, int], torch.Tensor]] = []
        self._rows: list[tuple[tuple[str, str, int], torch.Tensor]] = []
        self._losses: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        for number, stage in self._stages.items():
            self._hooks.append(stage.register_forward_pre_hook(self._begin_micro_batch))
            for name, module in stage.named_modules():
                self._hooks.append(module.register_forward_hook(self._forward_hook(name, number), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()
        if error is None:
            self._read()

    def losses(self, loss_B: torch.Tensor) -> None:
        """Summed cross-entropies of the sequences of the next micro-batch, in their order."""
        self._losses.append(loss_B.detach())

    def _begin_micro_batch(self, stage: nn.Module, inputs: Any) -> None:
        self._micro = self._passes.get(id(stage), 0)
        self._passes[id(stage)] = self._micro + 1

    def _forward_hook(self, name: str, stage: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # What is formed again has been seen, and its graph is thrown away.
            if is_recomputing():
                return
            given, made = list(_tensors((args, kwargs))), list(_tensors(output))
            self._note((name, FORWARD, type(module).__name__, self._micro, stage), given, made)
            self._claim(name, stage, given, made)
            if name in self._blocks and made:
                self._note_rows(name, FORWARD, self._micro, made[0])
                if made[0].requires_grad:
                    self._hooks.append(made[0].register_hook(self._rows_hook(name, self._micro)))

        return hook

    def _rows_hook(self, name: str, micro: int) -> Callable[[torch.Tensor], None]:
        return lambda gradient: self._note_rows(name, BACKWARD, micro, gradient)

    def _claim(self, name: str, stage: int, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Watch the nodes between a module's outputs and inputs that no module inside it has claimed."""
        border = {x.grad_fn for x in given if x.grad_fn is not None}
        found = [x.grad_fn for x in made if x.grad_fn is not None]
        while found:
            node = found.pop()
            if node in self._nodes or node in border or type(node).__name__ == "AccumulateGrad":
                continue
            self._nodes[node] = None
            about = (name, BACKWARD, type(node).__name__, self._micro, stage)
            self._hooks.append(node.register_hook(self._node_hook(about)))
            found += [before for before, _ in node.next_functions if before is not None]

    def _node_hook(self, about: tuple[str, str, str, int, int]) -> Callable[[Any, Any], None]:
        return lambda made, given: self._note(about, list(_tensors(given)), list(_tensors(made)))

    @torch.no_grad()
    def _note(self, about: tuple[str, str, str, int, int], given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        device = next((x.device for x in [*given, *made]), torch.device("cpu"))
        facts = torch.stack([*_facts(given, device), *_facts(made, device)])
        self._facts.append((about, facts))

    @torch.no_grad()
    def _note_rows(self, module: str, direction: str, micro: int, x: torch.Tensor) -> None:
        rows = x.detach().flatten(1).double()
        finite_B = torch.isfinite(rows).all(1)
        self._rows.append(((module, direction, micro), torch.stack([finite_B.double(), rows.norm(dim=1)])))

    def _read(self) -> None:
        """One wait for the device."""
        for about, facts in self._facts:
            given_finite, given_bits, made_finite, made_bits = facts.tolist()
            self.traced.events.append(Event(*about, bool(given_finite), bool(made_finite), given_bits, made_bits))
        for (module, direction, micro), rows in self._rows:
            finite_B, norm_B = rows.tolist()
            self.traced.sequences.append(Sequences(module, direction, micro, [bool(f) for f in finite_B], norm_B))
        self.traced.loss_AB = [loss_B.tolist() for loss_B in self._losses]
        self._facts.clear()
        self._rows.clear()
        self._losses.clear()


def _facts(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """(all finite, bits) of several tensors, int64 scalars."""
    finite, bits = torch.ones((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            finite = finite * is_finite(tensor).to(device)
        bits = bits + (2 * number + 1) * checksum(tensor).to(device)
    return [finite, bits]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
