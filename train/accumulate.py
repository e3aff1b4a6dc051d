"""Forward and backward passes over the micro-batches of a step: one after the other, or through a pipeline.

B sequences, S positions, Q of them that a rank is given, J kinds of loss: the next token's, then each depth's of
multi-token prediction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octofold.backends.collectives import all_reduce_sum
from octofold.parallel.mesh import Meshes
from octofold.parallel.pipeline import Pipeline
from octofold.parallel.sequence import positions_of
from octofold.train.data.batch import Batch
from octofold.train.engines.native import NativeEngine
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.models.decoder import Decoder
from octofold.train.models.stages import Stages

LossOf = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
"""From the logits and the labels of each kind of loss, J of both, to the scalar to differentiate."""


@dataclass(frozen=True)
class _Inputs:
    """What the model is given of a batch: positions of this rank, documents of whole sequences."""

    tokens_JBQ: list[torch.Tensor]
    labels_JBQ: list[torch.Tensor]
    positions_BQ: torch.Tensor
    doc_ids_BS: torch.Tensor | None


@dataclass(frozen=True)
class Accumulation:
    """Adds up the gradients of a step's loss."""

    model: Decoder | Stages
    engine: NativeEngine
    meshes: Meshes
    pipeline: Pipeline | None
    """Runs the model where it is `Stages`."""
    device: torch.device
    mask_documents: bool
    depths: int
    """Of multi-token prediction."""

    def count(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Labels that count in the whole global batch, int64 [J]."""
        labels_NJ = [[labels_BS for _, labels_BS in self._targets(batch)] for batch in batches]
        counted_J = torch.tensor([[valid_tokens(labels) for labels in labels_J] for labels_J in labels_NJ]).sum(0)
        # Ranks that share sequences read the same labels: one of them counts.
        counts = self.meshes.speaks and self.meshes.rank("context") == 0
        return all_reduce_sum(counted_J.to(self.device) * counts)

    def run(
        self,
        batches: Sequence[Batch],
        tokens_J: torch.Tensor,
        mtp_weight: float,
        each_sequence: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Gradients of this rank's share of the global mean losses; returns those shares, FP64 [J].

        Args:
            tokens_J: what each loss is divided by (`count`).
            mtp_weight: of the mean of the depths' losses.
            each_sequence: on ranks that know the losses, given the sums of each micro-batch's next-token losses, [B].
        """
        shares_J = torch.zeros(len(tokens_J), dtype=torch.float64, device=self.device)

        def loss_of(logits_J: Sequence[torch.Tensor], labels_J: Sequence[torch.Tensor]) -> torch.Tensor:
            vocabulary = self.meshes.dense.get_group("tensor")
            if each_sequence is not None:
                with torch.no_grad():
                    each = zip(logits_J[0].split(1), labels_J[0].split(1), strict=True)
                    each_sequence(torch.stack([summed_cross_entropy(x, y, vocabulary) for x, y in each]))
            pairs = zip(logits_J, labels_J, strict=True)
            sums_J = torch.stack([summed_cross_entropy(logits, labels, vocabulary) for logits, labels in pairs])
            losses_J = sums_J / tokens_J.clamp(min=1)
            shares_J.add_(losses_J.detach())
            return losses_J[0] + mtp_weight / max(self.depths, 1) * losses_J[1:].sum()

        inputs = [self._inputs(batch.to(self.device)) for batch in batches]
        if self.pipeline is not None:
            self._through(self.pipeline, inputs, loss_of)
        else:
            for number, given in enumerate(inputs, start=1):
                ahead = given.tokens_JBQ[1:]
                logits = self.model(given.tokens_JBQ[0], given.positions_BQ, given.doc_ids_BS, ahead=ahead)
                self.engine.backward(loss_of(logits, given.labels_JBQ), last=number == len(inputs))
        # Tensor ranks, which hold the same positions, have computed the same.
        return shares_J * (self.meshes.rank("tensor") == 0)

    def _through(self, pipeline: Pipeline, inputs: list[_Inputs], loss_of: LossOf) -> None:
        scale = self.engine.scaler.scale
        documents = [given.doc_ids_BS for given in inputs if given.doc_ids_BS is not None]
        pipeline.accumulate(
            torch.cat([given.tokens_JBQ[0] for given in inputs]),
            torch.cat([torch.stack(given.labels_JBQ, dim=1) for given in inputs]),
            lambda logits, labels_BJQ: loss_of(logits, labels_BJQ.unbind(1)) * scale,
            positions_BQ=torch.cat([given.positions_BQ for given in inputs]),
            doc_ids_BS=torch.cat(documents) if documents else None,
            ahead=[torch.cat([given.tokens_JBQ[1 + depth] for given in inputs]) for depth in range(self.depths)],
        )

    def _targets(self, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) of each kind of loss, [B, S]."""
        depths = range(1, self.depths + 1)
        deeper = [batch.ahead(depth, mask_documents=self.mask_documents) for depth in depths]
        return [(batch.tokens_BS, batch.labels_BS), *deeper]

    def _inputs(self, batch: Batch) -> _Inputs:
        # Targets are of whole sequences, and only then of the positions that this rank holds.
        tokens, labels = zip(*((self._own(x), self._own(y)) for x, y in self._targets(batch)), strict=True)
        documents = batch.doc_ids_BS if self.mask_documents else None
        return _Inputs(list(tokens), list(labels), self._own(batch.positions_BS), documents)

    def _own(self, x_BS: torch.Tensor) -> torch.Tensor:
        """The positions that this rank holds, [B, Q]."""
        return positions_of(x_BS, self.meshes.rank("context"), self.meshes.size("context"))
