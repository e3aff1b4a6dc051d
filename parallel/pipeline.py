"""The stages of a pipeline that stand on one rank, run by the schedules of torch.distributed.pipelining.

Every rank of a pipeline reads the same micro-batches; only the residual stream and its gradient travel between stages.
B sequences, Q tokens of a sequence that a rank is given, P of them in its residual stream, J kinds of loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from octofold.backends.collectives import Group, send_and_receive
from octofold.kernels.weight_gradients import WeightGradients
from octofold.parallel.config import ParallelConfig
from octofold.parallel.pipeline_split import SCHEDULES, rank_of_stage

LossOf = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
"""Of what the last stage returns for a micro-batch, and its labels [B, J, Q], the scalar to differentiate."""


class Pipeline:
    """Drives this rank's stages. Every method is collective over the ranks of the pipeline."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        config: ParallelConfig,
        group: Group,
        *,
        micro_batches: int,
        stream_BPD: torch.Tensor,
        outputs: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            stages: by number, those that `rank_of_stage` puts on this rank, split by `apply_plan`. The first maps int64
                tokens [B, Q], and every other the stream, to the stream; the last maps it to a list of tensors.
            group: the ranks of the pipeline.
            micro_batches: of a training step.
            stream_BPD: shape and dtype of what travels in training (meta device).
            outputs: how many tensors the last stage returns in training.
        """
        # Here, since importing it makes a folder and sets variables.
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        self.stages, self.group, self.device = dict(sorted(stages.items())), group, device
        self.ranks = rank_of_stage(config)
        self._dtype, self._width = stream_BPD.dtype, stream_BPD.shape[2]
        self._tensor = config.tensor
        self._loss_of: LossOf | None = None
        kind = SCHEDULES[config.pipeline_schedule]
        sent = stream_BPD.detach().requires_grad_()
        built = [
            PipelineStage(
                module,
                number,
                len(self.ranks),
                device,
                # Given, so that torch need not run the model to find out.
                input_args=torch.empty(stream_BPD.shape[:2], dtype=torch.int64, device="meta") if not number else sent,
                output_args=(sent,) * (outputs if number == len(self.ranks) - 1 else 1),
                group=group,
                dw_builder=_leave_weights(module).take if kind.splits_backward else None,
            )
            for number, module in self.stages.items()
        ]
        schedule = get_schedule_class(kind.torch_name)
        # scale_grads divides by the micro-batches; our losses are shares of the global batch already.
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        single = issubclass(schedule, PipelineScheduleSingle)
        self.schedule = schedule(built[0] if single else built, micro_batches, **options)

    @property
    def holds_last(self) -> bool:
        """Whether the last stage, which knows the losses, is on this rank."""
        return len(self.ranks) - 1 in self.stages

    @property
    def speaker(self) -> int:
        """A rank of the world that holds the last stage: the same on all ranks."""
        return self.ranks[-1] * (dist.get_world_size() // self.group.size())

    def accumulate(self, tokens: torch.Tensor, labels: torch.Tensor, loss_of: LossOf, **inputs: Any) -> None:
        """Forward and backward over all micro-batches of a step, which lie one after the other along B.

        Gradients are added up, and reduced over the ranks of each stage at the end.

        Args:
            tokens: int64 [B of all, Q].
            labels: int64 [B of all, J, Q].
            loss_of: called for each micro-batch on the last stage.
            inputs: further arguments of every stage; tensors are cut along their first dim as tokens are.
        """
        self._loss_of = loss_of
        first = {"first"} if 0 in self.stages else set()
        self.schedule.step(*([tokens] if first else []), target=labels, return_outputs=False, **inputs)
        self._loss_of = None

    @torch.no_grad()
    def forward(self, tokens_BQ: torch.Tensor, caches: Mapping[int, Any] | None = None, **inputs: Any) -> Any:
        """What the last stage makes of one batch of any size; None on ranks without it.

        Args:
            caches: by stage, handed to it as `cache`.
            inputs: further arguments of every stage.
        """
        stream = tokens_BQ
        for number, module in self.stages.items():
            if number and self.ranks[number - 1] != self.ranks[number]:
                sequences, length = tokens_BQ.shape
                stream = torch.empty(
                    sequences, length // self._tensor, self._width, dtype=self._dtype, device=self.device
                )
                send_and_receive([], [(stream, self.ranks[number - 1])], self.group)
            cache = {} if caches is None else {"cache": caches[number]}
            stream = module(stream, **inputs, **cache)
            if number + 1 < len(self.ranks) and self.ranks[number + 1] != self.ranks[number]:
                send_and_receive([(stream.contiguous(), self.ranks[number + 1])], [], self.group)
        return stream if self.holds_last else None

    def _loss(self, outputs: Sequence[torch.Tensor], labels_BJQ: torch.Tensor) -> torch.Tensor:
        assert self._loss_of is not None
        return self._loss_of(outputs, labels_BJQ)


def _leave_weights(stage: nn.Module) -> WeightGradients:
    """A queue for all modules of a stage that can leave gradients of weights for later."""
    queue = WeightGradients()
    for module in stage.modules():
        if hasattr(module, "later"):
            setattr(module, "later", queue)  # noqa: B010 - no parameter, module or buffer
    return queue
