"""The loop: fetch a global batch, forward and backward, step, balance, report, evaluate, save."""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from octofold.backends.accounting import Accounting, over_ranks
from octofold.backends.collectives import all_reduce_sum, world
from octofold.backends.errors import UserError
from octofold.backends.hierarchical import sums_taken
from octofold.backends.observing import observed
from octofold.backends.topology import Topology
from octofold.parallel.balance import gather_loads, load_metrics, update_biases
from octofold.parallel.mesh import Meshes
from octofold.parallel.pipeline import Pipeline
from octofold.parallel.placement_moves import ExpertPlacement
from octofold.parallel.transport import COUNTED, PURPOSES
from octofold.train.accumulate import Accumulation
from octofold.train.build import Names
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import RunConfig
from octofold.train.console import Console, RunProgress
from octofold.train.data.batch import Batch
from octofold.train.data.build import Data
from octofold.train.data.loader import Loader
from octofold.train.data.ngram import ngram_baselines
from octofold.train.data.stream import StreamLoader
from octofold.train.engines.native import NativeEngine, StepResult
from octofold.train.evaluate import evaluate
from octofold.train.flops import Utilisation
from octofold.train.metrics import MetricsWriter
from octofold.train.models.balance import LOSSES
from octofold.train.models.decoder import Decoder
from octofold.train.models.gate import take_loss_sums
from octofold.train.models.stages import Stages
from octofold.train.precision.apply import forget_weights, roll_histories, set_loss_scale, take_traffic
from octofold.train.precision.watch import Health, Watch
from octofold.train.sampling import generate
from octofold.train.stop import StopSignals

MAX_SKIPPED_IN_ROW = 20
"""Updates skipped one after the other before a run stops. Not counted is one that a smaller loss scale may cure: its
losses are finite and the scale is above its least. So broken weights, whose losses are not finite, end a run after as
many steps at any scale, while a scale that is far too large has the time that it takes to shrink."""


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
        utilisation: Utilisation,
        console: Console,
        metrics: MetricsWriter | None,
        rank: int,
        device: torch.device,
    ) -> None:
        """`metrics` is for rank 0 alone."""
        self.meshes, self.names, self.pipeline, self.placement = meshes, names, pipeline, placement
        self.config, self.model, self.engine, self.data, self.loader = config, model, engine, data, loader
        self.watch, self.utilisation = watch, utilisation
        self.checkpointer, self.console, self.metrics = checkpointer, console, metrics
        self.topology, self.rank, self.device = topology, rank, device
        self.accounting = Accounting(topology) if config.train.log_communication else None
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
        self.last_checkpoint: Path | None = None
        self._skipped_in_row = 0
        self._rank_imbalance = 1.0
        self._health: Health | None = None
        self._started_s = time.monotonic()
        self._begin_interval()

    def run(self, stop: StopSignals) -> bool:
        """Train to the configured number of steps; False: stopped by a signal. Saves in both cases."""
        train = self.config.train
        self._started_s = time.monotonic()
        with (
            self.console.progress(train.steps, self.progress.step) as bar,
            sums_taken(self.config.backend.all_reduce, world(), self.topology),
        ):
            self._begin_interval()
            going_on = True
            while going_on and self.progress.step < train.steps:
                with nullcontext() if self.accounting is None else observed(self.accounting):
                    going_on = self.step(stop, bar)
                if self.progress.step == train.steps or not going_on:
                    break
                if train.eval_every and self.progress.step % train.eval_every == 0:
                    self.validate(train.eval_sequences)
                if self.progress.step % self.config.checkpoint.every_steps == 0:
                    self.save()
        self.save()
        return self.progress.step == train.steps

    def step(self, stop: StopSignals, bar: RunProgress) -> bool:
        """One attempted update; False: some rank has been asked to stop."""
        batches = self.loader.next_step()
        tokens_J = self.accumulation.count(batches)
        schedule = self._schedule()
        self.watch.begin(self.progress.step + 1)
        shares_J = self._accumulate(batches, tokens_J, schedule)
        self._health = self.watch.collect() or self._health
        result = self.engine.step()
        roll_histories(self.model, self.names.delayed)
        loads_GE = self._balance(result, schedule)
        self.progress.step += 1
        self.progress.tokens_seen += int(tokens_J[0])
        self._place(loads_GE)
        balance_sums = take_loss_sums(list(self.gates.values())).to(shares_J)
        wish = shares_J.new_tensor([stop.received is not None])
        sent = take_traffic(self.model).to(shares_J)
        ended = all_reduce_sum(torch.cat([shares_J, balance_sums, wish, sent]))
        summed_J, summed_balance, wishes, sent = ended.split([len(shares_J), len(balance_sums), 1, len(sent)])
        self._interval_traffic += sent.cpu()
        losses = self._losses(summed_J.tolist(), summed_balance.tolist())
        self._report(bar, losses, result, loads_GE, int(tokens_J[0]))
        return not wishes.any()

    def _schedule(self) -> Schedule:
        """What holds for the next update."""
        model, done = self.config.model, self.engine.updates / self.config.train.steps
        return Schedule(
            mtp_weight=model.mtp.late_loss_weight if done >= model.mtp.late_from else model.mtp.loss_weight,
            bias_update_rate=model.balance.bias_update_rate if done < model.balance.bias_update_until else 0.0,
        )

    def _accumulate(self, batches: list[Batch], tokens_J: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """Gradients of this rank's share of the global mean losses; returns those shares, FP64 [J]."""
        set_loss_scale(self.model, self.engine.scaler.scale)
        take_traffic(self.model)  # an evaluation's do not count
        for gate in self.gates.values():
            gate.loss_scale.fill_(self.engine.scaler.scale / self.config.train.global_batch_size)
        return self.accumulation.run(batches, tokens_J, schedule.mtp_weight)

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

    def _place(self, loads_GE: torch.Tensor | None) -> None:
        """Where experts are packed anew from time to time: remember their loads, move them when it is time."""
        if self.placement is None or loads_GE is None:
            return
        self._rank_imbalance = self.placement.imbalance(loads_GE)
        self.placement.observe(loads_GE)
        if self.progress.step % self.config.parallel.placement_every == 0:
            moved = self.placement.improve()
            self._interval_moved += moved
            if moved:
                forget_weights(self.model)

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
        self,
        bar: RunProgress,
        losses: dict[str, Any],
        result: StepResult,
        loads_GE: torch.Tensor | None,
        tokens: int,
    ) -> None:
        step, train = self.progress.step, self.config.train
        self._count_skipped(losses, result)
        self._interval_tokens += tokens
        self._interval_steps += 1
        if step % train.log_every and step != train.steps and result.applied:
            return
        now_s = time.monotonic()
        elapsed_s = max(now_s - self._interval_s, 1e-9)
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            **losses,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "loss_scale": result.loss_scale,
            "overflows": self.engine.scaler.overflows,
            "tokens": self.progress.tokens_seen,
            "tokens_per_s": self._interval_tokens / elapsed_s,
            "step_s": elapsed_s / self._interval_steps,
            "time_s": now_s - self._started_s,
            **self._sent_metrics(),
            **self._placement_metrics(),
            **self.utilisation.metrics(elapsed_s / self._interval_steps),
            **self._communication_metrics(),
            **({"precision_health": self._health} if self._health is not None else {}),
            **(self._load_metrics(loads_GE) if loads_GE is not None else {}),
        }
        self._health = None
        self._begin_interval()
        self.log(record)
        bar.update(record)

    def _count_skipped(self, losses: dict[str, Any], result: StepResult) -> None:
        """Warn of a skipped update; stop a run that does nothing else."""
        step, scaler = self.progress.step, self.engine.scaler
        if result.applied:
            self._skipped_in_row = 0
            return
        total = sum(value if isinstance(value, float) else sum(value) for value in losses.values())
        if result.loss_scale <= scaler.floor or not math.isfinite(total):
            self._skipped_in_row += 1
        if self._skipped_in_row == MAX_SKIPPED_IN_ROW:
            # Every rank sees the same norm, so all stop here; the good checkpoints are not retired by broken ones.
            lower = "optim.lr or precision.loss_scale.init" if result.loss_scale > 1 else "optim.lr"
            raise UserError(
                f"step {step}: the gradient norm was not finite {MAX_SKIPPED_IN_ROW} times in a row\n"
                "  rule:   a batch may be skipped; a run that only skips has broken weights\n"
                f"  remedy: resume from an earlier checkpoint (last: {self.last_checkpoint}) with a lower {lower}"
            )
        shrunk = f"; the loss scale is now {scaler.scale:g}" if scaler.scale != result.loss_scale else ""
        skipped = "the update was skipped on every rank"
        self.console.warn(f"step {step}: gradient norm is {result.grad_norm}; {skipped}{shrunk}")

    def _begin_interval(self) -> None:
        """Start counting what the next report is averaged over."""
        self._interval_s, self._interval_tokens, self._interval_steps = time.monotonic(), 0, 0
        self._interval_moved = 0
        self._interval_traffic = torch.zeros(len(COUNTED), dtype=torch.float64)

    def _sent_metrics(self) -> dict[str, Any]:
        """What all ranks sent to other ranks' experts in a step, and what found no place, where that can be."""
        parallel, steps = self.config.parallel, self._interval_steps
        counted = dict(zip(COUNTED, (self._interval_traffic / steps).tolist(), strict=True))
        metrics: dict[str, Any] = {}
        if parallel.expert * parallel.expert_tensor > 1:
            metrics["sent_bytes"] = {purpose: counted[purpose] for purpose in PURPOSES}
            if any(counted[f"network_{purpose}"] for purpose in PURPOSES):
                metrics["network_bytes"] = {purpose: counted[f"network_{purpose}"] for purpose in PURPOSES}
        if parallel.expert_capacity:
            metrics["dropped_tokens"] = counted["dropped_tokens"]
        return metrics

    def _placement_metrics(self) -> dict[str, Any]:
        """How even the load of the last step was over ranks, as experts stood then, and how many have moved since."""
        if self.placement is None:
            return {}
        return {"rank_imbalance": self._rank_imbalance, "moved_experts": self._interval_moved}

    def _communication_metrics(self) -> dict[str, Any]:
        """What a step's collectives cost, over all ranks. Collective."""
        if self.accounting is None:
            return {}
        costs = over_ranks(self.accounting.take(), self._interval_steps, self.device)
        self.accounting.take()  # what gathering them cost
        return {"communication": costs}

    def _load_metrics(self, loads_GE: torch.Tensor) -> dict[str, Any]:
        """The loads as the metrics name them: of the worst layer, of all layers, and layer by layer."""
        layers, metrics = [str(layer) for layer in self.names.gates], load_metrics(loads_GE)
        shares_GE = loads_GE / loads_GE.sum(1, keepdim=True)
        return {
            "imbalance": float(metrics["imbalance"].max()),
            "unused_experts": int((loads_GE == 0).sum()),
            "balance": {name: dict(zip(layers, of_G.tolist(), strict=True)) for name, of_G in metrics.items()},
            "expert_load": dict(zip(layers, shares_GE.tolist(), strict=True)),
        }

    def validate(self, sequences: int) -> dict[str, Any] | None:
        """Loss on the first `sequences` of the validation split, logged and shown; None where there is no split."""
        if self.data.validation is None:
            return None
        sequences = min(sequences, len(self.data.validation))
        batches = self.data.validation_batches(
            sequences=sequences,
            micro_batch_size=self.config.train.micro_batch_size,
            data_rank=self.meshes.data_rank,
            data_ranks=self.config.parallel.data,
        )
        began_s = time.monotonic()
        mask = self.config.data.mask_documents
        loss, tokens = evaluate(
            self.model, batches, self.meshes, pipeline=self.pipeline, mask_documents=mask, device=self.device
        )
        record = {
            "kind": "validation",
            "step": self.progress.step,
            "loss": loss,
            "loss_per_byte": loss / self.data.validation.bytes_per_token,
            "tokens": tokens,
        }
        self.log(record)
        self.console.validation(record)
        self._interval_s += time.monotonic() - began_s
        return record

    def finish(self) -> dict[str, Any]:
        """Closing validation, n-gram baselines and a sample, as the `final` record."""
        train_s = time.monotonic() - self._started_s
        validation = self.validate(self.config.train.final_eval_sequences)
        text = ""
        if self.config.train.sample_tokens and not self.meshes.whole_model:
            self.console.info("no sample: no rank sees all of a sequence and a model; `octofold sample` reads the run")
        elif self.config.train.sample_tokens:
            text = generate(
                self.model,
                self.data.tokenizer,
                self.config.train.sample_prompt,
                pipeline=self.pipeline,
                tokens=self.config.train.sample_tokens,
                context=self.config.data.sequence_length,
                temperature=0.7,
                top_k=50,
                seed=self.config.train.seed,
                device=self.device,
            )
        record = {
            "kind": "final",
            "step": self.progress.step,
            "validation_loss": validation and validation["loss"],
            "validation_loss_per_byte": validation and validation["loss_per_byte"],
            "baselines": ngram_baselines(self.data) if validation and self.rank == 0 else {},
            "sample": text,
            "train_s": train_s,
        }
        self.log(record)
        return record

    def log(self, record: Mapping[str, Any]) -> None:
        """Append to the metrics (rank 0)."""
        if self.metrics is not None:
            self.metrics.log(dict(record))

    def save(self) -> None:
        """Save a checkpoint of the present step, unless there is one."""
        if self.saved_step == self.progress.step:
            return
        began_s = time.monotonic()
        state: dict[str, Any] = {
            "step": self.progress.step,
            "updates": self.engine.updates,
            "loss_scale": self.engine.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "tokens_seen": self.progress.tokens_seen,
            **self.progress.origin,
        }
        if self.placement is not None:
            state["placement"] = self.placement.state_dict()
        with self.logical_order():
            self.last_checkpoint = self.checkpointer.save(self.progress.step, self.engine.tensors(), state)
        self.saved_step = self.progress.step
        self._interval_s += time.monotonic() - began_s

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        state = self.checkpointer.load(folder, self.engine.tensors())
        origin: dict[str, Any] = {k: v for k, v in state.items() if k in ("imported_from", "scale_fmt", "block")}
        self.progress = Progress(state["step"], state["tokens_seen"], origin)
        self.engine.restore(state["updates"], state.get("loss_scale"))
        if self.placement is not None and "placement" in state:
            self.placement.load_state_dict(state["placement"])
        forget_weights(self.model)
        if not state.get("weights_only"):
            self.loader.load_state_dict(state["loader"])
        self.saved_step, self.last_checkpoint = self.progress.step, folder
