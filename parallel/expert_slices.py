"""Expert-tensor parallelism: ranks that hold slices of the same experts along their width I.

Each gathers the others' rows, computes its slice's part of every output, and the parts are sent back and summed in the
order of ranks. Rows travel in the dtype of the model.

S ranks that hold slices of the same experts, B blocks of rows, L experts, M rows here, A rows of all S ranks, D width.
"""

import torch

from octofold.backends.collectives import Group, PendingRows, all_gather_stack
from octofold.parallel.passage import Tensors, travel
from octofold.parallel.transport import Route, Traffic, send


class WholeExperts:
    """The experts of this rank are whole."""

    rank = 0
    """Its place among the S."""

    def gather_counts(self, counts_BL: torch.Tensor) -> torch.Tensor:
        """Rows of each block and expert on every rank that holds slices of these experts: [S, B, L]."""
        return counts_BL[None]

    def gather(self, x_MD: torch.Tensor, rows_S: list[int], traffic: Traffic) -> torch.Tensor:
        """The rows of all S ranks, one after the other: [A, D]. `rows_S`: how many each has."""
        return x_MD

    def scatter(self, y_AD: torch.Tensor, rows_S: list[int], traffic: Traffic) -> torch.Tensor:
        """The sum over slices of the rows that are this rank's: [M, D]."""
        return y_AD


class SlicedExperts(WholeExperts):
    """Slices of the experts are spread over a group."""

    def __init__(self, group: Group, nodes: tuple[int, ...] = ()) -> None:
        """`nodes`: the node of each rank; empty: all are on one."""
        self.group, self.nodes = group, nodes
        self.rank = group.rank()

    def gather_counts(self, counts_BL: torch.Tensor) -> torch.Tensor:
        return all_gather_stack(counts_BL.contiguous(), self.group)

    def gather(self, x_MD: torch.Tensor, rows_S: list[int], traffic: Traffic) -> torch.Tensor:
        there, back = self._passages(rows_S, traffic, "dispatch")
        return travel(there, back, x_MD)[0]

    def scatter(self, y_AD: torch.Tensor, rows_S: list[int], traffic: Traffic) -> torch.Tensor:
        back, there = self._passages(rows_S, traffic, "combine")
        return travel(there, back, y_AD)[0]

    def _passages(self, rows_S: list[int], traffic: Traffic, purpose: str) -> tuple["_ToAll", "_SumFromAll"]:
        own = [rows_S[self.rank]] * len(rows_S)
        route = Route(self.group, own, rows_S, self.nodes)
        to, home = ("", "_gradient") if purpose == "dispatch" else ("_gradient", "")
        return _ToAll(route, traffic, purpose + to), _SumFromAll(route.back, traffic, purpose + home)


class _ToAll:
    """A passage: this rank's rows to every rank. An uneven exchange: libraries gather equal parts only."""

    def __init__(self, route: Route, traffic: Traffic, purpose: str) -> None:
        self.route, self.traffic, self.purpose = route, traffic, purpose

    def begin(self, tensors: Tensors) -> PendingRows:
        (x_MD,) = tensors
        return send(x_MD.repeat(len(self.route.send_counts), 1), self.route, self.traffic, self.purpose)

    def end(self, pending: PendingRows) -> Tensors:
        return (pending.wait(),)


class _SumFromAll:
    """The transpose: each rank's rows to it, summed over the ranks they come from."""

    def __init__(self, route: Route, traffic: Traffic, purpose: str) -> None:
        self.route, self.traffic, self.purpose = route, traffic, purpose

    def begin(self, tensors: Tensors) -> PendingRows:
        (y_AD,) = tensors
        return send(y_AD.contiguous(), self.route, self.traffic, self.purpose)

    def end(self, pending: PendingRows) -> Tensors:
        parts = pending.wait()
        return (parts.view(len(self.route.receive_counts), -1, parts.shape[1]).sum(0),)
