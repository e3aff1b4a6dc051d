"""Experts on the move: their weights and moments travel to the slots that an order gives them.

Nothing outside the model's memory knows of orders: names, loads, biases, gates and checkpoints are logical.
E experts, G layers with experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from octofold.backends.collectives import Group, all_gather_stack, exchange_rows
from octofold.parallel.placement import Order, imbalance, improved

Tensors = Callable[[nn.Parameter], list[torch.Tensor]]
"""A parameter and all that is placed like it (moments); what is written into them counts."""


class ExpertPlacement:
    """Where the experts of each layer stand, the loads that decide where they go, and the way there."""

    def __init__(
        self,
        layers: Sequence[int],
        owners: Mapping[int, nn.Module],
        group: Group,
        tensors: Tensors,
        *,
        ranks: int,
        nodes: int,
        groups: int,
    ) -> None:
        """
        Args:
            layers: with experts, by number, in the order that loads are listed in.
            owners: of those layers that this rank has (a stage of a pipeline has some), by number: modules with a
                submodule `experts` (parameters stacked [E, …]) and an attribute `slot_E`, by which they find an
                expert's slot (None: the logical order).
            group: the ranks that share an expert's stack: those of a replica of a stage.
            tensors: what moves with a parameter.
            ranks, nodes, groups: see `placement.improved`.
        """
        self.layers, self.owners, self.group, self.tensors = layers, owners, group, tensors
        self.ranks, self.nodes, self.groups = ranks, nodes, groups
        self.orders: dict[int, Order] = {}
        """Of layers that are not in logical order."""
        self._loads_GE: torch.Tensor | None = None
        self._steps = 0

    def observe(self, loads_GE: torch.Tensor) -> None:
        """A step's loads by expert, of all layers, equal on every rank."""
        loads_GE = loads_GE.to("cpu", torch.float64)
        self._loads_GE = loads_GE.clone() if self._loads_GE is None else self._loads_GE + loads_GE
        self._steps += 1

    def improve(self) -> int:
        """Pack by the mean loads since the last time, move, and begin a new mean; returns how many experts moved.

        Collective over `group`; every rank decides alike, without asking.
        """
        if self._loads_GE is None:
            return 0
        after: dict[int, Order] = {}
        for layer, loads_E in zip(self.layers, (self._loads_GE / self._steps).tolist(), strict=True):
            present = self.orders.get(layer) or list(range(len(loads_E)))
            after[layer] = improved(loads_E, present, ranks=self.ranks, nodes=self.nodes, groups=self.groups)
        self._loads_GE, self._steps = None, 0
        return self._move(after)

    def imbalance(self, loads_GE: torch.Tensor) -> float:
        """Load of the busiest rank ÷ mean load of a rank, of the worst layer, as experts stand now."""
        logical = list(range(loads_GE.shape[1]))
        return max(
            imbalance(loads_E, self.orders.get(layer, logical), self.ranks)
            for layer, loads_E in zip(self.layers, loads_GE.tolist(), strict=True)
        )

    @contextmanager
    def logical_order(self) -> Iterator[None]:
        """Every expert in its logical slot for a while, to be saved or gathered. Collective."""
        before = dict(self.orders)
        self._move({})
        try:
            yield
        finally:
            self._move(before)

    def begin_anew(self) -> None:
        """Every expert in its logical slot, to be read from a checkpoint, and no loads remembered. Collective."""
        self._move({})
        self._loads_GE, self._steps = None, 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {
            "orders": {str(layer): order for layer, order in self.orders.items()},
            "loads": None if self._loads_GE is None else self._loads_GE.tolist(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, on any layout, with tensors that have been read in logical order. Collective."""
        self.orders = {}
        loads = state["loads"]
        self._loads_GE = None if loads is None else torch.tensor(loads, dtype=torch.float64)
        self._steps = state["steps"]
        self._move({int(layer): order for layer, order in state["orders"].items()})

    @torch.no_grad()
    def _move(self, orders: dict[int, Order]) -> int:
        """Bring every layer into its order (logical where there is none)."""
        moved = 0
        for layer in self.layers:
            before, after = self.orders.get(layer), orders.get(layer)
            logical = list(range(len(before or after or [])))
            before, after = before or logical, after or logical
            if before == after:
                continue
            moved += sum(a != b for a, b in zip(before, after, strict=True))
            if (owner := self.owners.get(layer)) is not None:
                slot_of = {expert: slot for slot, expert in enumerate(before)}
                self._move_layer(owner, [slot_of[expert] for expert in after], after)
            self.orders[layer] = after
            if after == logical:
                del self.orders[layer]
        return moved

    def _move_layer(self, owner: nn.Module, sources: list[int], order: Order) -> None:
        experts = owner.get_submodule("experts")
        assert isinstance(experts, FSDPModule)
        experts.reshard()  # an evaluation may have left it gathered
        for parameter in experts.parameters():
            for tensor in self.tensors(parameter):
                assert isinstance(tensor, DTensor)
                move_rows(tensor, sources, self.group)
        device = next(experts.parameters()).device
        slot_E = torch.empty(len(order), dtype=torch.int64, device=device)
        slot_E[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        setattr(owner, "slot_E", None if order == sorted(order) else slot_E)  # noqa: B010


def slots_by_parameter(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of parameters whose experts are not in logical order, by name: the slot of each expert, int64 [E]."""
    return {
        f"{name}.experts.{parameter}": module.slot_E
        for name, module in model.named_modules()
        if isinstance(getattr(module, "slot_E", None), torch.Tensor)
        for parameter, _ in module.get_submodule("experts").named_parameters()
    }


def move_rows(stack: DTensor, sources: list[int], group: Group) -> None:
    """Row s becomes what row `sources[s]` was, in place. Collective; one exchange, whatever moves.

    Args:
        stack: [E, …], split over the ranks of `group` in any way, each holding neighbouring rows of it.
        sources: a permutation of 0 … E−1.
    """
    shard = stack.to_local()
    shape, offset = compute_local_shape_and_global_offset(stack.shape, stack.device_mesh, stack.placements)
    windows_Rw = all_gather_stack(torch.tensor([*offset, *shape], device=shard.device), group).tolist()
    dims = len(shape)
    here = windows_Rw[group.rank()]

    def rows_for(reader: list[int], holder: list[int]) -> list[int]:
        """Rows, as the holder counts them, that the reader gets from it, in the order of the reader's slots."""
        # Ranks that hold other columns of the stack have nothing for one another.
        if reader[1:dims] + reader[dims + 1 :] != holder[1:dims] + holder[dims + 1 :]:
            return []
        first, rows = holder[0], holder[dims]
        wanted = sources[reader[0] : reader[0] + reader[dims]]
        return [row - first for row in wanted if first <= row < first + rows]

    sent = [rows_for(reader, here) for reader in windows_Rw]
    received = [rows_for(here, holder) for holder in windows_Rw]
    leaving = shard[[row for rows in sent for row in rows]]
    arrived = exchange_rows(leaving, [len(rows) for rows in received], [len(rows) for rows in sent], group)
    # They arrive by holder; a slot wants the next row of the rank that holds its source.
    arrival = {
        source: number
        for number, source in enumerate(windows_Rw[rank][0] + row for rank, rows in enumerate(received) for row in rows)
    }
    shard.copy_(arrived[[arrival[source] for source in sources[here[0] : here[0] + here[dims]]]])
