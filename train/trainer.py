"""The loop: fetch a global batch, forward and backward, step, balance, report, evaluate, save."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octofold.backends.collectives import all_reduce_sum
from octofold.backends.errors import UserError
from octofold.parallel.balance import gather_loads, update_biases
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
from octofold.train.loss import summed_cross_entropy, valid_tokens
from octofold.train.metrics import MetricsWriter
from octofold.train.models.decoder import Decoder
from octofold.train.sampling import generate
from octofold.train.stop import StopSignals

MAX_SKIPPED_IN_ROW = 20
"""Updates skipped one after the other before a run stops."""


@dataclass
class Progress:
    """What a checkpoint continues from, beside tensors."""

    step: int = 0
    """Attempted updates."""
    tokens_seen: int = 0
    """Labels that counted, over all ranks."""


class Trainer:
    """Owns the order of things in a run; the parts are built elsewhere and know nothing of one another."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: Decoder,
        engine: NativeEngine,
        data: Data,
        loader: Loader | StreamLoader,
        checkpointer: Checkpointer,
        console: Console,
        metrics: MetricsWriter | None,
        rank: int,
        device: torch.device,
    ) -> None:
        """`metrics` is for rank 0 alone; `rank` is also the data rank."""
        self.config, self.model, self.engine, self.data, self.loader = config, model, engine, data, loader
        self.checkpointer, self.console, self.metrics = checkpointer, console, metrics
        self.rank, self.device = rank, device
        self.gates = model.gates()
        self.progress = Progress()
        self.saved_step: int | None = None
        self.last_checkpoint: Path | None = None
        self._skipped_in_row = 0
        self._started_s = time.monotonic()
        self._begin_interval()

    def run(self, stop: StopSignals) -> bool:
        """Train to the configured number of steps; False: stopped by a signal. Saves in both cases."""
        train = self.config.train
        self._started_s = time.monotonic()
        with self.console.progress(train.steps, self.progress.step) as bar:
            self._begin_interval()
            going_on = True
            while going_on and self.progress.step < train.steps:
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
        counted = sum(valid_tokens(batch.labels_BS) for batch in batches)
        tokens = int(all_reduce_sum(torch.tensor(counted, device=self.device)))
        share = self._accumulate(batches, max(tokens, 1))
        result = self.engine.step()
        loads_GE = self._balance(result)
        self.progress.step += 1
        self.progress.tokens_seen += tokens
        ended = torch.stack([share, share.new_tensor(stop.received is not None)])
        loss, wishes = all_reduce_sum(ended).tolist()
        self._report(bar, loss, result, loads_GE, tokens)
        return wishes == 0

    def _accumulate(self, batches: list[Batch], global_tokens: int) -> torch.Tensor:
        """Gradients of this rank's share of the global mean loss; returns that share."""
        share = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            documents = batch.doc_ids_BS if self.config.data.mask_documents else None
            logits = self.model(batch.tokens_BS, batch.positions_BS, documents)
            loss = summed_cross_entropy(logits, batch.labels_BS) / global_tokens
            self.engine.backward(loss, last=number == len(batches))
            share += loss.detach()
        return share

    def _balance(self, result: StepResult) -> torch.Tensor | None:
        """Sum the loads of all ranks; move the biases after an applied update."""
        if not self.gates:
            return None
        gates = self.gates.values()
        loads_GE = gather_loads([gate.load_E for gate in gates])
        if result.applied:
            rate = self.config.model.bias_update_rate
            update_biases([gate.e_score_correction_bias for gate in gates], loads_GE, rate)
        return loads_GE

    def _report(
        self, bar: RunProgress, loss: float, result: StepResult, loads_GE: torch.Tensor | None, tokens: int
    ) -> None:
        step, train = self.progress.step, self.config.train
        self._skipped_in_row = 0 if result.applied else self._skipped_in_row + 1
        if self._skipped_in_row == MAX_SKIPPED_IN_ROW:
            # Every rank sees the same norm, so all stop here; the good checkpoints are not retired by broken ones.
            raise UserError(
                f"step {step}: the gradient norm was not finite {MAX_SKIPPED_IN_ROW} times in a row\n"
                "  rule:   a batch may be skipped; a run that only skips has broken weights\n"
                f"  remedy: resume from an earlier checkpoint (last: {self.last_checkpoint}) with a lower optim.lr"
            )
        if not result.applied:
            self.console.warn(f"step {step}: gradient norm is {result.grad_norm}; the update was skipped on every rank")
        self._interval_tokens += tokens
        self._interval_steps += 1
        if step % train.log_every and step != train.steps and result.applied:
            return
        now_s = time.monotonic()
        elapsed_s = max(now_s - self._interval_s, 1e-9)
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "tokens": self.progress.tokens_seen,
            "tokens_per_s": self._interval_tokens / elapsed_s,
            "step_s": elapsed_s / self._interval_steps,
            "time_s": now_s - self._started_s,
            **(self._load_metrics(loads_GE) if loads_GE is not None else {}),
        }
        self._begin_interval()
        self.log(record)
        bar.update(record)

    def _begin_interval(self) -> None:
        """Start counting what the next report is averaged over."""
        self._interval_s, self._interval_tokens, self._interval_steps = time.monotonic(), 0, 0

    def _load_metrics(self, loads_GE: torch.Tensor) -> dict[str, Any]:
        shares_GE = loads_GE / loads_GE.sum(1, keepdim=True).clamp(min=1)
        imbalance_G = shares_GE.amax(1) * shares_GE.shape[1]
        return {
            "imbalance": float(imbalance_G.max()),
            "unused_experts": int((loads_GE == 0).sum()),
            "expert_load": {str(layer): row for layer, row in zip(self.gates, shares_GE.tolist(), strict=True)},
        }

    def validate(self, sequences: int) -> dict[str, Any] | None:
        """Loss on the first `sequences` of the validation split, logged and shown; None where there is no split."""
        if self.data.validation is None:
            return None
        sequences = min(sequences, len(self.data.validation))
        batches = self.data.validation_batches(
            sequences=sequences,
            micro_batch_size=self.config.train.micro_batch_size,
            data_rank=self.rank,
            data_ranks=self.config.parallel.data,
        )
        began_s = time.monotonic()
        mask = self.config.data.mask_documents
        loss, tokens = evaluate(self.model, batches, mask_documents=mask, device=self.device)
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
        if self.config.train.sample_tokens:
            text = generate(
                self.model,
                self.data.tokenizer,
                self.config.train.sample_prompt,
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
            "loader": self.loader.state_dict(),
            "tokens_seen": self.progress.tokens_seen,
        }
        self.last_checkpoint = self.checkpointer.save(self.progress.step, self.engine.tensors(), state)
        self.saved_step = self.progress.step
        self._interval_s += time.monotonic() - began_s

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        state = self.checkpointer.load(folder, self.engine.tensors())
        self.progress = Progress(step=state["step"], tokens_seen=state["tokens_seen"])
        self.engine.restore(state["updates"])
        self.loader.load_state_dict(state["loader"])
        self.saved_step, self.last_checkpoint = self.progress.step, folder
