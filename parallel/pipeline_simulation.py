"""How long a step of a pipeline takes, how much of it is bubble, and how many activations each rank holds.

Walks the action tables of the schedules that train (torch.distributed.pipelining), as each rank would: one action after
the other, each as soon as what it needs has arrived. Computation on a rank and what travels do not hinder each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline_split import SCHEDULES, rank_of_stage, split_layers, stages_a_rank

FORWARD, FULL, INPUT, WEIGHT = "F", "B", "I", "W"
"""What is computed, in torch's letters: forward, all of backward, or its gradients of inputs or of weights."""


class Action(NamedTuple):
    """One pass of a micro-batch through a stage."""

    stage: int
    kind: str
    micro_batch: int


Table = dict[int, list[Action]]
"""By rank, what it computes, in order."""


@dataclass(frozen=True)
class StageCost:
    """Of one micro-batch on one stage."""

    forward_s: float
    backward_input_s: float
    """Of gradients of activations."""
    backward_weight_s: float
    """Of gradients of weights; a whole backward pass takes the sum of both."""
    send_s: float = 0.0
    """Of the stream to a neighbouring rank, or of its gradient back."""
    activation_bytes: float = 1.0
    """Held from a micro-batch's forward pass until its last backward pass."""


@dataclass(frozen=True)
class Simulated:
    """What a step comes to."""

    step_s: float
    busy_s: list[float]
    """Of each rank, spent computing."""
    peak_activations: list[int]
    """Of each rank: micro-batches, counted on each of its stages, that it holds at once."""
    peak_bytes: list[float]

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time in a step in which they wait."""
        return 1.0 - sum(self.busy_s) / (self.step_s * len(self.busy_s))


def action_table(config: ParallelConfig, micro_batches: int) -> Table:
    """What each rank of the configured schedule computes, in order: no process group is needed.

    Args:
        config: checked by `check_pipeline`.
    """
    kind, ranks, held = SCHEDULES[config.pipeline_schedule], config.pipeline, stages_a_rank(config)
    if config.pipeline_schedule == "1f1b":
        return {rank: _one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)}
    from torch.distributed.pipelining.schedules import get_schedule_class  # whose import makes a folder

    # All that a schedule asks of stages before it runs them.
    stages = [
        SimpleNamespace(
            group_size=ranks, group_rank=0, num_stages=ranks * held, stage_index=number, is_last=False, submod=None
        )
        for number in range(held)
    ]
    given: Any = stages[0] if held == 1 else stages
    order = get_schedule_class(kind.torch_name)(given, micro_batches).pipeline_order
    return {rank: [leaf for action in actions for leaf in _leaves(action)] for rank, actions in order.items()}


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """What torch's 1F1B does; the table that it draws of itself lacks the last rank's first forward pass."""
    ahead = min(micro_batches, ranks - rank)
    actions = [Action(rank, FORWARD, number) for number in range(ahead)]
    for number in range(micro_batches):
        actions.append(Action(rank, FULL, number))
        if number + ahead < micro_batches:
            actions.append(Action(rank, FORWARD, number + ahead))
    return actions


def _leaves(action: Any) -> list[Action]:
    """An overlapped forward and backward is computed one after the other here; gaps and reductions take no time."""
    if action is None:
        return []
    if action.sub_actions is not None:
        return [leaf for part in action.sub_actions for leaf in _leaves(part)]
    kind = action.computation_type.value
    return [Action(action.stage_index, kind, action.microbatch_index)] if kind in (FORWARD, FULL, INPUT, WEIGHT) else []


def simulate(table: Table, costs: Sequence[StageCost], ranks: Sequence[int]) -> Simulated:
    """Run a table.

    Args:
        table: from `action_table`.
        costs: of each stage.
        ranks: of each stage (`rank_of_stage`).
    """
    done_s: dict[tuple[int, bool, int], float] = {}
    """When a stage was done with a micro-batch, forward (True) or with the gradient of its input."""
    waiting = {rank: list(actions) for rank, actions in table.items()}
    clock_s, busy_s = dict.fromkeys(table, 0.0), dict.fromkeys(table, 0.0)
    while any(waiting.values()):
        ready = [
            rank for rank, actions in waiting.items() if actions and _needed(actions[0], len(ranks)) <= done_s.keys()
        ]
        assert ready, "the schedule waits for itself"
        for rank in ready:
            action = waiting[rank].pop(0)
            stage, begin_s = action.stage, clock_s[rank]
            for needed in _needed(action, len(ranks)):
                travels = ranks[needed[0]] != rank
                begin_s = max(begin_s, done_s[needed] + (costs[needed[0]].send_s if travels else 0.0))
            took_s = _took_s(action, costs[stage])
            clock_s[rank] = begin_s + took_s
            busy_s[rank] += took_s
            if action.kind != WEIGHT:
                done_s[stage, action.kind == FORWARD, action.micro_batch] = clock_s[rank]
    peaks = {rank: _peaks(actions, costs) for rank, actions in table.items()}
    return Simulated(
        max(clock_s.values()),
        [busy_s[rank] for rank in sorted(table)],
        [peaks[rank][0] for rank in sorted(table)],
        [peaks[rank][1] for rank in sorted(table)],
    )


def _needed(action: Action, stages: int) -> set[tuple[int, bool, int]]:
    """What must be done before: the neighbour's part, and the stage's own earlier pass."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == FORWARD:
        return {(stage - 1, True, micro_batch)} if stage else set()
    if action.kind == WEIGHT:
        return {(stage, False, micro_batch)}
    own = {(stage, True, micro_batch)}
    return own | ({(stage + 1, False, micro_batch)} if stage + 1 < stages else set())


def _took_s(action: Action, cost: StageCost) -> float:
    return {
        FORWARD: cost.forward_s,
        FULL: cost.backward_input_s + cost.backward_weight_s,
        INPUT: cost.backward_input_s,
        WEIGHT: cost.backward_weight_s,
    }[action.kind]


def _peaks(actions: Sequence[Action], costs: Sequence[StageCost]) -> tuple[int, float]:
    """Most micro-batches, and most bytes of them, that a rank holds at once."""
    held, held_bytes, most, most_bytes = 0, 0.0, 0, 0.0
    for action in actions:
        if action.kind == INPUT:
            continue
        sign = 1 if action.kind == FORWARD else -1
        held += sign
        held_bytes += sign * costs[action.stage].activation_bytes
        most, most_bytes = max(most, held), max(most_bytes, held_bytes)
    return most, most_bytes


def simulate_schedule(config: ParallelConfig, micro_batches: int, costs: Sequence[StageCost]) -> Simulated:
    """`simulate` the configured schedule.

    Args:
        config: checked by `check_pipeline`.
        costs: of each stage.
    """
    return simulate(action_table(config, micro_batches), costs, rank_of_stage(config))


def stage_costs(config: ParallelConfig, layers: int, depths: int, of_layer: StageCost) -> list[StageCost]:
    """Costs of the stages that `split_layers` makes, from those of one layer and the layers that the ends count as.

    Args:
        config: checked by `check_pipeline`.
        layers, depths: of the model.
    """
    costs = []
    for part in split_layers(config, layers, depths):
        held = float(len(part.layers))
        held += config.pipeline_embedding_layers if part.first else 0.0
        held += config.pipeline_head_layers * (1 + depths) + depths if part.last else 0.0
        costs.append(
            StageCost(
                held * of_layer.forward_s,
                held * of_layer.backward_input_s,
                held * of_layer.backward_weight_s,
                of_layer.send_s,
                held * of_layer.activation_bytes,
            )
        )
    return costs
