"""Which route takes tokens to their experts: chosen once, by name.

To add one: a class derived from `ExchangedExperts` (parallel/expert.py) and a line here; or name it as
package.module:class in `parallel.expert_route`. A class may say why it cannot serve by a function `why_unsupported` in
its module, which takes the device's type.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from octofold.backends.collectives import Group
from octofold.backends.dotted import is_dotted, load_dotted
from octofold.backends.errors import ConfigError, unknown_name_error
from octofold.parallel.config import ParallelConfig
from octofold.parallel.expert import ExchangedExperts, ExpertRoute, LocalExperts
from octofold.parallel.expert_capacity import CapacityExperts
from octofold.parallel.expert_slices import SlicedExperts

ROUTES = {
    "flat": "octofold.parallel.expert:FlatExperts",
    "two_stage": "octofold.parallel.expert_two_stage:TwoStageExperts",
    "deepep": "octofold.parallel.expert_deepep:DeepEpExperts",
}


NodeOf = Callable[[int], int]
"""The node of a global rank."""


def one_node(rank: int) -> int:
    """All ranks stand on one node."""
    return 0


def nodes_of(group: Group, node_of: NodeOf) -> tuple[int, ...]:
    """The node of each rank of a group."""
    return tuple(node_of(rank) for rank in dist.get_process_group_ranks(group))


def chosen_route(config: ParallelConfig, nodes: tuple[int, ...]) -> str:
    """`parallel.expert_route` with `auto` decided: two stages pay where the experts' ranks stand on several nodes."""
    if config.expert_route != "auto":
        return config.expert_route
    return "two_stage" if len(set(nodes)) > 1 and not config.expert_capacity else "flat"


def build_route(
    config: ParallelConfig, group: Group, slices: Group, *, device: torch.device, node_of: NodeOf = one_node
) -> ExpertRoute:
    """The route to experts that are split over `group`, in slices over `slices`.

    Raises:
        ConfigError: a route that does not exist or cannot serve here.
    """
    if group.size() * slices.size() == 1 and not config.expert_capacity:
        return LocalExperts()
    nodes = nodes_of(group, node_of)
    options: dict[str, Any] = {
        "nodes": nodes,
        "overlap": config.expert_overlap,
        "slices": SlicedExperts(slices, nodes_of(slices, node_of)) if slices.size() > 1 else None,
    }
    name = chosen_route(config, nodes)
    if config.expert_capacity:
        return CapacityExperts(group, config.expert_capacity, **options)
    if name not in ROUTES and not is_dotted(name):
        raise unknown_name_error("parallel.expert_route", name, ["auto", *ROUTES])
    target = ROUTES.get(name, name)
    route_class = load_dotted(target, "parallel.expert_route")
    if not (isinstance(route_class, type) and issubclass(route_class, ExchangedExperts)):
        rule = "a route is a class derived from octofold.parallel.expert.ExchangedExperts"
        raise ConfigError("parallel.expert_route", name, rule, "parallel.expert_route=auto")
    why_unsupported = getattr(import_module(target.partition(":")[0]), "why_unsupported", None)
    if why_unsupported is not None and (reason := why_unsupported(device.type)) is not None:
        raise ConfigError(
            "parallel.expert_route", name, f"the route must work here: {reason}", "parallel.expert_route=auto"
        )
    return route_class(group, **options)
