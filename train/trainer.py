"""The loop: fetch a global batch, forward and backward, step, balance, report, evaluate, save."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from octofold.backends.accounting import Accounting
from octofold.backends.collectives import all_reduce_sum
from octofold.backends.errors import UserError
from octofold.backends.hierarchical import sums_taken
from octofold.backends.observing import observed
from octofold.backends.topology import Topology
from octofold.parallel.balance import gather_loads, update_biases
from octofold.parallel.mesh import Meshes
from octofold.parallel.pipeline import Pipeline
from octofold.parallel.placement_moves import ExpertPlacement
from octofold.train.accumulate import Accumulation
from octofold.train.anomaly.guard import Guard
from octofold.train.anomaly.replicas import Replicas
from octofold.train.anomaly.respond import respond
from octofold.train.build import Names
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.manager import SIGN_S, Checkpointer
from octofold.train.closing import validate
from octofold.train.config import RunConfig
from octofold.train.console import Console, RunProgress
from octofold.train.data.batch import Batch
from octofold.train.data.build import Data
from octofold.train.data.loader import Loader
from octofold.train.data.stream import StreamLoader
from octofold.train.engines.native import NativeEngine, StepResult
from octofold.train.flops import Utilisation
from octofold.train.metrics import MetricsWriter
from octofold.train.models.balance import LOSSES
from octofold.train.models.decoder import Decoder
from octofold.train.models.gate import take_loss_sums
from octofold.train.models.stages import Stages
from octofold.train.precision.apply import forget_weights, roll_histories, set_loss_scale, take_traffic
from octofold.train.precision.watch import Health, Watch
from octofold.train.random_state import seed_step
from octofold.train.reporting import Interval, load_record, step_metrics
from octofold.train.stop import StopSignals
from octofold.train.watchdog import Watchdog


@dataclass
class Progress:
    """What a checkpoint continues from, beside tensors."""

    step: int = 0
    """Attempted updates."""
    tokens_seen: int = 0
    """Labels that counted, over all ranks."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Of a run that began from imported weights: where they came from, and how they were quantised."""


@dataclass(frozen=True)
class Schedule:
    """What the number of applied updates decides, beside the learning rate."""

    mtp_weight: float
    bias_update_rate: float


class Trainer:
    """Owns the order of things in a run; the parts are built elsewhere and know nothing of one another."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: Decoder | Stages,
        pipeline: Pipeline | None,
        names: Names,
        meshes: Meshes,
        topology: Topology,
        engine: NativeEngine,
        placement: ExpertPlacement | None,
        data: Data,
        loader: Loader | StreamLoader,
        checkpointer: Checkpointer,
        watch: Watch,
        watchdog: Watchdog,
        utilisation: Utilisation,
        console: Console,
        metrics: MetricsWriter | None,
        rank: int,
        device: torch.device,
    ) -> None:
        """`metrics` is for rank 0 alone."""
        self.meshes, self.names, self.pipeline, self.placement = meshes, names, pipeline, placement
        self.config, self.model, self.engine, self.data, self.loader = config, model, engine, data, loader
        self.watch, self.watchdog = watch, watchdog
        self.checkpointer, self.console, self.metrics = checkpointer, console, metrics
        self.topology, self.rank, self.device = topology, rank, device
        accounting = Accounting(topology) if config.train.log_communication else None
        factor = config.train.slow_rank_factor
        self.interval = Interval(config.parallel, utilisation, accounting, watchdog.flight, factor)
        self.gates = model.gates()
        self.accumulation = Accumulation(
            model,
            engine,
            meshes,
            pipeline,
            device,
            mask_documents=config.data.mask_documents,
            depths=config.model.num_nextn_predict_layers,
        )
        self.progress = Progress()
        self.saved_step: int | None = None
        self.guard = Guard(
            config.train,
            model,
            engine,
            parameters=names.parameters,
            stages=1 if pipeline is None else len(pipeline.ranks),
            sum_losses=lambda shares_J: self._sum(shares_J)[0],
            rank=rank,
            device=device,
        )
        self.replicas = Replicas(engine, self._counts, device)
        self._rank_imbalance = 1.0
        self._health: Health | None = None

    def run(self, stop: StopSignals) -> bool:
        """Train to the configured number of steps; False: stopped by a signal. Saves in both cases."""
        train = self.config.train
        with self.watchdog.longer("save"):
            self.checkpointer.begin(self.progress.step)
        self.interval.start()
        with (
            self.console.progress(train.steps, self.progress.step) as bar,
            sums_taken(self.config.backend.all_reduce, self.topology),
        ):
            going_on = True
            while going_on and self.progress.step < train.steps:
                before = self.progress.step
                with nullcontext() if self.interval.accounting is None else observed(self.interval.accounting):
                    going_on = self.step(stop, bar)
                self.watchdog.step_done(self.progress.step)
                self._check_replicas(last=not going_on)
                if self.progress.step <= before:  # gone back
                    continue
                if self.progress.step == train.steps or not going_on:
                    break
                if train.eval_every and self.progress.step % train.eval_every == 0:
                    validate(self, train.eval_sequences)
                if self.progress.step % self.config.checkpoint.every_steps == 0:
                    self.save()
        self._save_for_good()
        return self.progress.step == train.steps

    def _save_for_good(self) -> None:
        """The last checkpoint, which no later interval makes up for: tried again after a while.

        Raises:
            UserError: it could not be written.
        """
        retry_s = self.config.checkpoint.retry_s
        for pause_s in (retry_s, 3 * retry_s, None):
            try:
                self.save(last=True)
                with self.watchdog.longer("save"):
                    self.checkpointer.wait()
                return
            except UserError as error:
                if pause_s is None:
                    raise
                reason = str(error).splitlines()[0]
                self.console.warn(f"{reason}; the run ends here, so it is tried again in {pause_s:g} s")
            self.saved_step = None
            until_s = time.monotonic() + pause_s
            while (left_s := until_s - time.monotonic()) > 0:
                time.sleep(min(left_s, SIGN_S))
                self.watchdog.sign()

    def step(self, stop: StopSignals, bar: RunProgress) -> bool:
        """One attempted update; False: some rank has been asked to stop."""
        began = self.loader.samples_seen
        batches = self.loader.next_step()
        tokens_J = self.accumulation.count(batches)
        schedule = self._schedule()
        self.watch.begin(self.progress.step + 1)
        run = partial(self._accumulate, batches, tokens_J, schedule)
        shares_J = self.guard.accumulate(self.progress.step + 1, run, self.loader.samples_AB.tolist())
        self._health = self.watch.collect() or self._health
        asked = shares_J.new_tensor(stop.wishes())
        losses, others = self._sum(shares_J, torch.cat([asked, take_traffic(self.model).to(shares_J)]))
        asked, sent = others[: len(asked)], others[len(asked) :]
        self.checkpointer.let_go()
        result = self.engine.step(partial(self.guard.allows, losses))
        roll_histories(self.model, self.names.delayed)
        loads_GE = self._balance(result, schedule)
        self.progress.step += 1
        self.progress.tokens_seen += int(tokens_J[0])
        moved = self._place(loads_GE)
        self.interval.add(tokens=int(tokens_J[0]), traffic=sent, moved_experts=moved)
        is_last = self.progress.step == self.config.train.steps
        if self.progress.step % self.config.train.log_every == 0 or is_last or not result.applied:
            self._report(bar, losses, result, loads_GE)
        if self.guard.anomaly is not None:
            with self.watchdog.longer("response to an anomaly"):
                respond(self, self.guard.anomaly, (began, self.loader.samples_seen), self._shrunk(result))
        elif not result.applied:
            said = f"gradient norm is {result.grad_norm}; the update was skipped on every rank{self._shrunk(result)}"
            self.console.warn(f"step {self.progress.step}: {said}")
        return not stop.agree(asked.tolist())

    def _sum(self, shares_J: torch.Tensor, others: torch.Tensor | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """The losses by name from all ranks' shares, and the sums of other FP64 numbers. Collective."""
        balance_sums = take_loss_sums(list(self.gates.values())).to(shares_J)
        parts = [shares_J, balance_sums, shares_J.new_empty(0) if others is None else others]
        summed_J, summed_balance, others = all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])
        return self._losses(summed_J.tolist(), summed_balance.tolist()), others

    def _schedule(self) -> Schedule:
        """What holds for the next update."""
        model, done = self.config.model, self.engine.updates / self.config.train.steps
        return Schedule(
            mtp_weight=model.mtp.late_loss_weight if done >= model.mtp.late_from else model.mtp.loss_weight,
            bias_update_rate=model.balance.bias_update_rate if done < model.balance.bias_update_until else 0.0,
        )

    def _accumulate(
        self,
        batches: list[Batch],
        tokens_J: torch.Tensor,
        schedule: Schedule,
        each_sequence: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Gradients of this rank's share of the global mean losses; returns those shares, FP64 [J]."""
        set_loss_scale(self.model, self.engine.scaler.scale)
        take_traffic(self.model)  # an evaluation's do not count
        stands = (self.meshes.rank("context"), self.meshes.rank("pipeline"))
        seed_step(self.config.train.seed, self.progress.step + 1, int(self.loader.samples_AB[0, 0]), *stands)
        for gate in self.gates.values():
            gate.loss_scale.fill_(self.engine.scaler.scale / self.config.train.global_batch_size)
        return self.accumulation.run(batches, tokens_J, schedule.mtp_weight, each_sequence)

    def _balance(self, result: StepResult, schedule: Schedule) -> torch.Tensor | None:
        """Sum the loads of all ranks; move the biases after an applied update."""
        if not self.names.gates:
            return None
        # Layers of other stages have been used elsewhere.
        elsewhere = torch.zeros(self.config.model.n_routed_experts, dtype=torch.int64, device=self.device)
        loads = [self.gates[layer].load_E if layer in self.gates else elsewhere for layer in self.names.gates]
        loads_GE = gather_loads(loads)
        biases = {self.names.gates.index(layer): gate.e_score_correction_bias for layer, gate in self.gates.items()}
        biased = {g: bias for g, bias in biases.items() if bias is not None}
        if result.applied and biased:
            update_biases(list(biased.values()), loads_GE[list(biased)], schedule.bias_update_rate)
        return loads_GE

    def _place(self, loads_GE: torch.Tensor | None) -> int:
        """Where experts are packed anew from time to time: remember their loads, move them when it is time.

        Returns how many were moved.
        """
        if self.placement is None or loads_GE is None:
            return 0
        self._rank_imbalance = self.placement.imbalance(loads_GE)
        self.placement.observe(loads_GE)
        if self.progress.step % self.config.parallel.placement_every:
            return 0
        moved = self.placement.improve()
        if moved:
            forget_weights(self.model)
        return moved

    def logical_order(self) -> AbstractContextManager[None]:
        """Every expert where its number puts it, for as long as weights or moments are read. Collective."""
        return nullcontext() if self.placement is None else self.placement.logical_order()

    def _losses(self, losses_J: list[float], balance_sums: list[float]) -> dict[str, Any]:
        """The losses as the metrics name them: cross-entropies, and the means over sequences of balance losses."""
        named: dict[str, Any] = {"loss": losses_J[0]}
        if len(losses_J) > 1:
            named["mtp_losses"] = losses_J[1:]
        balance, sequences = self.config.model.balance, self.config.train.global_batch_size
        for name, summed in zip(LOSSES, balance_sums, strict=True):
            if getattr(balance, f"{name}_loss"):
                named[f"{name}_loss"] = summed / sequences / len(self.names.gates)
        return named

    def _report(
        self, bar: RunProgress, losses: dict[str, Any], result: StepResult, loads_GE: torch.Tensor | None
    ) -> None:
        """Log and show the step, with means over the steps since the last report. Collective."""
        record: dict[str, Any] = {
            "kind": "train",
            "step": self.progress.step,
            **losses,
            **step_metrics(result),
            "overflows": self.engine.scaler.overflows,
            "tokens": self.progress.tokens_seen,
            **({} if self.placement is None else {"rank_imbalance": self._rank_imbalance}),
            **self.interval.take(self.device),
            **({"precision_health": self._health} if self._health is not None else {}),
            **(load_record(self.names.gates, loads_GE) if loads_GE is not None else {}),
        }
        self._health = None
        for rank, times in record.get("slow_ranks", {}).items():
            self.console.warn(
                f"step {record['step']}: rank {rank} is slow: it computes {times:.1f} times as long as usual"
            )
        self.log(record)
        bar.update(record)

    def _shrunk(self, result: StepResult) -> str:
        scale = self.engine.scaler.scale
        return f"; the loss scale is now {scale:g}" if scale != result.loss_scale else ""

    def _check_replicas(self, *, last: bool) -> None:
        """Compare copies when it is time, and before every save, so that what a run goes back to is sound."""
        train, step = self.config.train, self.progress.step
        saves = step % self.config.checkpoint.every_steps == 0 or step == train.steps or last
        if train.check_replicas_every and (step % train.check_replicas_every == 0 or saves):
            with self.interval.paused():
                anomaly = self.replicas.check()
                if anomaly is not None:
                    with self.watchdog.longer("response to an anomaly"):
                        respond(self, anomaly, None)

    def _counts(self) -> dict[str, Any]:
        """What decides the next step beside tensors, alike on every rank."""
        loader = {"samples_seen": self.loader.samples_seen, "left_out": self.loader.left_out}
        progress = {"step": self.progress.step, "tokens_seen": self.progress.tokens_seen}
        engine = {"updates": self.engine.updates, "loss_scale": self.engine.scaler.state_dict()}
        return {**progress, **engine, "loader": loader, "guard": self.guard.state_dict()}

    def log(self, record: Mapping[str, Any]) -> None:
        """Append to the metrics (rank 0)."""
        if self.metrics is not None:
            self.metrics.log(dict(record))

    def save(self, *, last: bool = False) -> None:
        """Save a checkpoint of the present step, unless there is one; `last`: see `Checkpointer.save`."""
        if self.saved_step == self.progress.step:
            return
        state = self.state()  # of experts where they stand now, which the tensors do not show
        with self.interval.paused(), self.watchdog.longer("save"), self.logical_order():
            tensors = self.engine.tensors()
            # Where experts are put in their order for it, they go back at once. Buffers may change in a forward pass.
            steady = self.engine.updated(tensors) if self.placement is None else ()
            self.checkpointer.save(self.progress.step, tensors, state, until_update=steady, last=last)
        self.saved_step = self.progress.step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as plain values."""
        state: dict[str, Any] = {
            "step": self.progress.step,
            "updates": self.engine.updates,
            "loss_scale": self.engine.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "tokens_seen": self.progress.tokens_seen,
            "anomalies": self.guard.state_dict(),
            **self.progress.origin,
        }
        if self.placement is not None:
            state["placement"] = self.placement.state_dict()
        return state

    def load(self, where: Path | str | Folder) -> Folder:
        """Continue from the newest valid checkpoint of a place (`Checkpointer.load`), which is returned."""
        if self.placement is not None:
            self.placement.begin_anew()
        with self.watchdog.longer("load"):
            loaded = self.checkpointer.load(where, self.engine.tensors())
        state = loaded.state
        origin: dict[str, Any] = {k: v for k, v in state.items() if k in ("imported_from", "scale_fmt", "block")}
        self.progress = Progress(state["step"], state["tokens_seen"], origin)
        self.engine.restore(state["updates"], state.get("loss_scale"))
        self.guard.load_state_dict(state.get("anomalies", {}))
        if self.placement is not None and "placement" in state:
            self.placement.load_state_dict(state["placement"])
        forget_weights(self.model)
        if not state.get("weights_only"):
            self.loader.load_state_dict(state["loader"])
        self.saved_step = self.progress.step
        return loaded.folder

    @property
    def last_checkpoint(self) -> Folder | None:
        """The newest that was published or loaded."""
        return self.checkpointer.last
