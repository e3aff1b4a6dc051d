"""The stages of a pipeline that stand on one rank, seen as one model under the names of the whole."""

from collections.abc import Iterator, Mapping

from torch import nn

from octofold.parallel.plan import ParallelPlan
from octofold.train.models.decoder import Decoder
from octofold.train.models.gate import TopKGate


class Stages(nn.Module):
    """Several decoders, each with layers of its own. The pipeline runs them (parallel/pipeline.py)."""

    def __init__(self, stages: Mapping[int, Decoder]) -> None:
        """
        Args:
            stages: by number, in order.
        """
        super().__init__()
        self.config = next(iter(stages.values())).config
        self.by_number = dict(stages)
        for number, stage in stages.items():
            self.add_module(str(number), stage)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Modules of all stages, and with them parameters and buffers, as the whole model names them.

        One name comes twice where a rank holds the embedding and its copy.
        """
        memo = set() if memo is None else memo
        for stage in self.by_number.values():
            yield from stage.named_modules(memo, prefix, remove_duplicate)

    def plan(self) -> ParallelPlan:
        """Those of the stages, joined."""
        plans = [stage.plan() for stage in self.by_number.values()]
        return ParallelPlan(
            blocks=tuple(name for plan in plans for name in plan.blocks),
            experts=tuple(name for plan in plans for name in plan.experts),
        )

    def gates(self) -> dict[int, TopKGate]:
        """The gate of each layer with experts that is here, by layer number."""
        return {number: gate for stage in self.by_number.values() for number, gate in stage.gates().items()}

    def ends(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The embedding's weight and its copy, as far as they are here and there is a copy at all."""
        original: nn.Parameter | None = None
        copied: nn.Parameter | None = None
        for stage in self.by_number.values():
            if stage.part.first and stage.embedding_has_a_copy:
                original = stage.embed_tokens.get_parameter("weight")
            if stage.copies_embedding:
                copied = stage.embed_tokens.get_parameter("weight")
        return original, copied
