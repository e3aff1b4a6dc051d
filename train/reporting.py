"""What a step is reported as: counts taken since the last report, and the record that they and the losses make."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from octofold.backends.accounting import Accounting, over_ranks
from octofold.backends.flight import FlightRecorder
from octofold.parallel.balance import load_metrics
from octofold.parallel.config import ParallelConfig
from octofold.parallel.transport import COUNTED, PURPOSES
from octofold.train.engines.native import StepResult
from octofold.train.flops import Utilisation
from octofold.train.slow_ranks import pace_metrics


class Interval:
    """Counts since the last report, of which each metric is the mean a step. Evaluations and saves are left out."""

    def __init__(
        self,
        parallel: ParallelConfig,
        utilisation: Utilisation,
        accounting: Accounting | None,
        flight: FlightRecorder,
        slow_rank_factor: float,
    ) -> None:
        """
        Args:
            accounting: counts and times collectives; None: they are not reported.
            flight: knows how long this rank waits in them.
            slow_rank_factor: see `octofold.train.slow_ranks`.
        """
        self.accounting = accounting
        self._parallel, self._utilisation, self._flight = parallel, utilisation, flight
        self._slow_rank_factor = slow_rank_factor
        self._warm = False
        self._started_s = time.monotonic()
        self.begin()

    def start(self) -> None:
        """The run begins here: `elapsed_s` counts from now on."""
        self._started_s = time.monotonic()
        self.begin()

    def begin(self) -> None:
        """Start counting anew."""
        self._began_s, self._tokens, self._steps, self._moved = time.monotonic(), 0, 0, 0
        self._traffic = torch.zeros(len(COUNTED), dtype=torch.float64)
        self._in_flight_s = self._flight.in_flight_s()

    @property
    def elapsed_s(self) -> float:
        """Since `start`."""
        return time.monotonic() - self._started_s

    def add(self, *, tokens: int, traffic: torch.Tensor, moved_experts: int) -> None:
        """Count a step.

        Args:
            tokens: labels that counted, over all ranks.
            traffic: what all ranks sent, by `parallel.transport.COUNTED`.
        """
        self._tokens += tokens
        self._steps += 1
        self._moved += moved_experts
        self._traffic += traffic.cpu()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no part of a step."""
        began_s, in_flight_s = time.monotonic(), self._flight.in_flight_s()
        yield
        self._began_s += time.monotonic() - began_s
        self._in_flight_s += self._flight.in_flight_s() - in_flight_s

    def take(self, device: torch.device) -> dict[str, Any]:
        """Metrics of a mean step, and begin anew. Collective."""
        step_s = max(time.monotonic() - self._began_s, 1e-9) / self._steps
        waited_s = (self._flight.in_flight_s() - self._in_flight_s) / self._steps
        metrics = {
            "tokens_per_s": self._tokens / step_s / self._steps,
            "step_s": step_s,
            "time_s": self.elapsed_s,
            **self._sent(),
            **({"moved_experts": self._moved} if self._parallel.placement_every else {}),
            **self._utilisation.metrics(step_s),
            **self._communication(device),
            **self._pace(step_s - waited_s, device),
        }
        self.begin()
        return metrics

    def _sent(self) -> dict[str, Any]:
        """What all ranks sent to other ranks' experts, and what found no place, where that can be."""
        parallel = self._parallel
        counted = dict(zip(COUNTED, (self._traffic / self._steps).tolist(), strict=True))
        metrics: dict[str, Any] = {}
        if parallel.expert * parallel.expert_tensor > 1:
            metrics["sent_bytes"] = {purpose: counted[purpose] for purpose in PURPOSES}
            if any(counted[f"network_{purpose}"] for purpose in PURPOSES):
                metrics["network_bytes"] = {purpose: counted[f"network_{purpose}"] for purpose in PURPOSES}
        if parallel.expert_capacity:
            metrics["dropped_tokens"] = counted["dropped_tokens"]
        return metrics

    def _communication(self, device: torch.device) -> dict[str, Any]:
        """What the collectives of a step cost, over all ranks. Collective."""
        if self.accounting is None:
            return {}
        costs = over_ranks(self.accounting.take(), self._steps, device)
        self.accounting.take()  # what gathering them cost
        return {"communication": costs}

    def _pace(self, compute_s: float, device: torch.device) -> dict[str, Any]:
        """How long ranks compute, and which are slow, where the host sees when collectives end. Collective."""
        if device.type != "cpu":
            return {}
        # Ranks warm up differently, which says nothing about them.
        stages, factor = self._parallel.pipeline, self._slow_rank_factor if self._warm else 0.0
        self._warm = True
        metrics = pace_metrics(max(compute_s, 0.0), device, stages=stages, factor=factor)
        if self.accounting is not None:
            self.accounting.take()  # what gathering them cost
        return metrics


def step_metrics(result: StepResult) -> dict[str, Any]:
    """The optimiser step as the metrics name it."""
    return {
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "applied": result.applied,
        "loss_scale": result.loss_scale,
    }


def load_record(layers: Sequence[int], loads_GE: torch.Tensor) -> Mapping[str, Any]:
    """The loads as the metrics name them: of the worst layer, of all layers, and layer by layer.

    Args:
        layers: numbers of the layers with experts.
        loads_GE: int64, tokens of each expert of each of them.
    """
    names, metrics = [str(layer) for layer in layers], load_metrics(loads_GE)
    shares_GE = loads_GE / loads_GE.sum(1, keepdim=True)
    return {
        "imbalance": float(metrics["imbalance"].max()),
        "unused_experts": int((loads_GE == 0).sum()),
        "balance": {name: dict(zip(names, of_G.tolist(), strict=True)) for name, of_G in metrics.items()},
        "expert_load": dict(zip(names, shares_GE.tolist(), strict=True)),
    }
