"""Stands between the backward pass and the update: lets sound steps through and finds out about the others.

An update whose numbers are not sound is applied on no rank. The state is then still that from which its numbers were
computed, so the step is computed again, watched module by module: whether it goes wrong again tells bad data or weights
from a device that erred, and where it first does, who and what was to blame. Every method is collective.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from octofold.backends.collectives import all_gather_bytes, all_reduce_sum
from octofold.train.anomaly.account import Anomaly
from octofold.train.anomaly.bits import checksum, is_finite
from octofold.train.anomaly.blame import (
    Blame,
    Testimony,
    accuse,
    broken_samples,
    first_break,
    first_difference,
    first_place,
    grown_most,
    heights,
    stand_out,
)
from octofold.train.anomaly.events import Traced
from octofold.train.anomaly.judge import Bound, Finding, Judge
from octofold.train.anomaly.trace import Trace
from octofold.train.config import TrainConfig
from octofold.train.engines.native import NativeEngine
from octofold.train.models.decoder import Decoder
from octofold.train.models.stages import Stages
from octofold.train.precision.apply import fp8_states

EACH_SEQUENCE = Callable[[torch.Tensor], None]
"""Takes the summed cross-entropies of a micro-batch's sequences."""
Pass = Callable[[EACH_SEQUENCE | None], torch.Tensor]
"""Forward and backward passes over the step's batch, and this rank's shares of the losses, FP64 [J]."""
FORGETTING = 0.1
"""Weight of the last step in a parameter's usual gradient norm."""


class Guard:
    """Judges every step of a run, and computes some of them twice."""

    def __init__(
        self,
        config: TrainConfig,
        model: Decoder | Stages,
        engine: NativeEngine,
        *,
        parameters: Sequence[str],
        stages: int,
        sum_losses: Callable[[torch.Tensor], Mapping[str, Any]],
        rank: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            parameters: names of all of the model's, also of those on other ranks.
            stages: of the pipeline.
            sum_losses: this rank's shares of the losses to the losses by name; collective.
        """
        self.config, self.model, self.engine = config, model, engine
        self.judge, self.bound = Judge(config.spike_factor), Bound(config.max_anomalies, config.anomaly_window)
        self.anomaly: Anomaly | None = None
        """Of the step in hand."""
        self._parts: dict[int, nn.Module] = dict(model.by_number) if isinstance(model, Stages) else {0: model}
        self._parameters = {name: number for number, name in enumerate(parameters)}
        self._stages, self._sum_losses, self._rank, self._device = stages, sum_losses, rank, device
        self._usual_P: torch.Tensor | None = None
        self._run: Pass
        self._shares_J: torch.Tensor
        self._samples_AB: list[list[int]] = []
        engine.keep_squares = bool(config.spike_factor)

    def accumulate(self, step: int, run: Pass, samples_AB: list[list[int]]) -> torch.Tensor:
        """The step's passes, done twice every `train.recheck_every` steps; what they return.

        Args:
            samples_AB: global samples of this rank's micro-batches.
        """
        self._run, self._samples_AB, self.anomaly = run, samples_AB, None
        every = self.config.recheck_every
        self._shares_J = self._recheck() if every and step % every == 0 else run(None)
        return self._shares_J

    def allows(self, losses: Mapping[str, Any], grad_norm: float) -> bool:
        """Whether the update may be applied; if not, and no smaller loss scale may help, `anomaly` says why.

        Gradients are gone then.
        """
        if self.anomaly is not None:
            return False
        scaler = self.engine.scaler
        finding = self.judge.find(losses, grad_norm, curable=scaler.scale > scaler.floor)
        if finding is not None:
            self.anomaly = self._investigate(finding)
            return False
        if not math.isfinite(grad_norm):
            return False
        self.judge.accept(float(losses["loss"]), grad_norm)
        if self.config.spike_factor:
            squares_P = self._squares()
            self._usual_P = squares_P if self._usual_P is None else self._usual_P.lerp(squares_P, FORGETTING)
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seen": self.judge.state_dict(), "recent": [list(pair) for pair in self.bound.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, or from nothing."""
        self.judge.load_state_dict(state.get("seen", {}))
        self.bound.recent = [(step, account) for step, account in state.get("recent", [])]

    def _investigate(self, finding: Finding) -> Anomaly:
        shares_J = self._shares_J
        with self._again(self._buffers()):
            again_J, traced = self._traced()
            grad_norm = self.engine.measure()
            found = self.judge.find(self._sum_losses(again_J), grad_norm, curable=False)
            norms, usual = self._norms() if finding.what == "spike" else ({}, {})
        layer = grown_most(norms, usual)
        of_samples = heights(traced, self._samples_AB, layer).get(finding.number, {}) if finding.what == "spike" else {}
        testimonies = self._exchanged(
            Testimony(
                self._rank,
                place=first_break(traced.events, self._stages),
                samples={**broken_samples(traced, self._samples_AB), finding.number: list(of_samples)},
                heights={finding.number: list(of_samples.values())},
                broken_weights=[name for name, p in self.model.named_parameters() if not is_finite(p)],
                differs=_bits(shares_J) != _bits(again_J),
            )
        )
        if found is None:
            differing = [said.rank for said in testimonies if said.differs]
            return Anomaly(finding, Blame(differing, None, None, []), "device")
        if finding.what == "spike":
            samples, ranks = stand_out(testimonies, finding.number)
            return Anomaly(finding, Blame(ranks, layer, None, samples), "data or weights")
        weights = any(said.broken_weights for said in testimonies)
        return Anomaly(finding, accuse(testimonies), "weights" if weights else "data or model")

    def _recheck(self) -> torch.Tensor:
        """Both passes twice from one state, which must give the same bits."""
        before = self._buffers()
        shares_J, first = self._traced()
        gradients = self._gradients()
        with self._again(before, keep=True):
            again_J, second = self._traced()
        differs = _bits(shares_J) != _bits(again_J) or gradients != self._gradients()
        differs = differs or [e.made_bits for e in first.events] != [e.made_bits for e in second.events]
        if all_reduce_sum(torch.tensor([float(differs)], device=self._device)).item():
            place = first_difference(first.events, second.events, self._stages)
            testimonies = self._exchanged(Testimony(self._rank, place=place, differs=differs))
            ranks, place = first_place(testimonies)
            # None where all modules agree: the bits changed on the way into the sum of gradients.
            ranks = ranks or [said.rank for said in testimonies if said.differs]
            blame = (
                Blame(ranks, place.module or "model", place.direction, []) if place else Blame(ranks, None, None, [])
            )
            self.anomaly = Anomaly(Finding("recheck"), blame, "device")
        return again_J

    def _traced(self) -> tuple[torch.Tensor, Traced]:
        blocks = {name for part in self._parts.values() for name in _blocks(part)}
        with Trace(self._parts, blocks) as trace:
            shares_J = self._run(trace.losses)
        return shares_J, trace.traced

    @contextmanager
    def _again(self, before: list[torch.Tensor], *, keep: bool = False) -> Any:
        """Compute the step again inside, from the state `before` it, and leave no trace of that.

        Args:
            keep: leave the gradients and what the passes count, which are those of the step.
        """
        after = self._buffers()
        self.engine.optimizer.zero_grad()
        self._set_buffers(before)
        observers = {state: state.observer for state in fp8_states(self.model).values()}
        for state in observers:
            state.observer = None
            if state.recipe.delayed and not keep:
                state.amax_K.zero_()  # of this step alone
        yield
        for state, observer in observers.items():
            state.observer = observer
        if not keep:
            self._set_buffers(after)
            self.engine.optimizer.zero_grad()

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer.clone() for buffer in self.model.buffers()]

    def _set_buffers(self, values: list[torch.Tensor]) -> None:
        for buffer, value in zip(self.model.buffers(), values, strict=True):
            buffer.copy_(value)

    def _gradients(self) -> list[int]:
        """The bits of this rank's shards."""
        sums = [checksum(p.grad) for p in self.model.parameters() if p.grad is not None]
        return torch.stack(sums).tolist() if sums else []

    def _squares(self) -> torch.Tensor:
        """This rank's parts of the squared gradient norms that the engine measured last, FP64 [P]."""
        squares_P = torch.zeros(len(self._parameters), dtype=torch.float64, device=self._device)
        of_names = {n: self.engine.squares[p] for n, p in self.model.named_parameters() if p in self.engine.squares}
        if of_names:
            rows = torch.tensor([self._parameters[name] for name in of_names], device=self._device)
            squares_P[rows] = torch.stack(list(of_names.values())) / self.engine.scaler.scale**2
        return squares_P

    def _norms(self) -> tuple[dict[str, float], dict[str, float]]:
        """Gradient norms of all parameters, and the usual ones."""
        now_P = self._squares()
        usual_P = torch.zeros_like(now_P) if self._usual_P is None else self._usual_P.clone()
        now_P, usual_P = all_reduce_sum(torch.stack([now_P, usual_P])).sqrt()
        return tuple(dict(zip(self._parameters, norms.tolist(), strict=True)) for norms in (now_P, usual_P))  # type: ignore[return-value]

    def _exchanged(self, testimony: Testimony) -> list[Testimony]:
        return [Testimony.decode(text) for text in all_gather_bytes(testimony.encode(), self._device)]


def _blocks(part: nn.Module) -> list[str]:
    """The modules whose outputs keep sequences apart: embedding, layers, head."""
    assert isinstance(part, Decoder)
    ends = [name for name in ("embed_tokens", "norm", "lm_head") if hasattr(part, name)]
    return [*ends, *part.plan().blocks]


def _bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int64).tolist()
