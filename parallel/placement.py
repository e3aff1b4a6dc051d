"""Which rank holds which experts: packed anew from time to time, so that ranks have as much to do as one another.

The greedy packing of EPLB without replicas (https://github.com/deepseek-ai/EPLB, hierarchical balancing): groups of
experts to nodes, so that routing that is limited to a few groups stays limited to a few nodes; then experts to the
ranks of a node, the same number to each. A slot is a place in the stack [E, …] of a layer's experts: rank r of the
expert axis holds the slots r·L … (r+1)·L − 1. An order says which expert stands in each slot; the logical order is
0 … E−1.
"""

from collections.abc import Sequence

Order = list[int]
"""Expert in each slot."""


def packed(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Items into packs of equal number: the heaviest first, each into the lightest pack that has room. Ties: the lower
    number first.

    Args:
        loads: one an item; their number is a multiple of `packs`.
    """
    room = len(loads) // packs
    assert room * packs == len(loads)
    filled: list[list[int]] = [[] for _ in range(packs)]
    weights = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        lightest = min((p for p in range(packs) if len(filled[p]) < room), key=lambda p: (weights[p], p))
        filled[lightest].append(item)
        weights[lightest] += loads[item]
    return filled


def settled(packs: list[list[int]], present: list[list[int]]) -> list[list[int]]:
    """The packs in the order of the places that keeps items where they are: the largest overlap is settled first.

    Args:
        present: items now in each place.
    """
    overlaps = {(p, q): len({*pack} & {*place}) for p, pack in enumerate(packs) for q, place in enumerate(present)}
    settled_in: dict[int, int] = {}
    for p, q in sorted(overlaps, key=lambda pair: (-overlaps[pair], pair)):
        if p not in settled_in.values() and q not in settled_in:
            settled_in[q] = p
    return [packs[settled_in[q]] for q in range(len(present))]


def rank_loads(loads_E: Sequence[float], order: Order, ranks: int) -> list[float]:
    """What each rank of the expert axis computes."""
    held = len(order) // ranks
    return [sum(loads_E[e] for e in order[rank * held : (rank + 1) * held]) for rank in range(ranks)]


def imbalance(loads_E: Sequence[float], order: Order, ranks: int) -> float:
    """Load of the busiest rank ÷ mean load of a rank; 1 is even."""
    loads = rank_loads(loads_E, order, ranks)
    return max(loads) * ranks / sum(loads) if sum(loads) else 1.0


def improved(loads_E: Sequence[float], present: Order, *, ranks: int, nodes: int, groups: int) -> Order:
    """A better order for these loads; `present` itself where packing finds none.

    Args:
        loads_E: by expert.
        ranks: of the expert axis; divides the number of experts.
        nodes: that these ranks stand on, in order, as many ranks on each; groups are kept together on a node where the
            nodes divide them, as EPLB does.
        groups: of experts that lie side by side, as the gate limits them.
    """
    experts = len(present)
    if groups % nodes or ranks % nodes:
        nodes = groups = 1
    size, held = experts // groups, experts // ranks
    by_node = [present[i : i + experts // nodes] for i in range(0, experts, experts // nodes)]
    group_loads = [sum(loads_E[g * size : (g + 1) * size]) for g in range(groups)]
    chosen = [[g * size + i for g in pack for i in range(size)] for pack in packed(group_loads, nodes)]
    order: Order = []
    for mine, here in zip(settled(chosen, by_node), by_node, strict=True):
        packs = [[mine[i] for i in pack] for pack in packed([loads_E[e] for e in mine], ranks // nodes)]
        places = [here[i : i + held] for i in range(0, len(here), held)]
        for pack, place in zip(settled(packs, places), places, strict=True):
            order += _keeping(pack, place)
    better = max(rank_loads(loads_E, order, ranks)) < max(rank_loads(loads_E, present, ranks))
    return order if better else present


def _keeping(pack: list[int], place: list[int]) -> list[int]:
    """The pack in the slots of a rank: who is there stays, newcomers take the free slots."""
    newcomers = iter(sorted({*pack} - {*place}))
    return [expert if expert in pack else next(newcomers) for expert in place]
