"""A run's record: one JSON object a line in `metrics.jsonl`, copied to Weights & Biases and TensorBoard. Torch-free.

A record is a flat dict with `kind` and `step`; its fields by kind (losses in nats):

    train       loss, mtp_losses, sequence_loss, expert_loss, device_loss, communication_loss, z_loss, lr, grad_norm,
                applied, loss_scale, overflows, tokens, tokens_per_s, step_s, time_s, model_tflops, mfu,
                precision_health, communication, sent_bytes, network_bytes, dropped_tokens, imbalance, unused_experts,
                balance, expert_load
    validation  loss, loss_per_byte, tokens
    anomaly     what, number, value, usual, cause, ranks, layer, direction, samples, origins, account, action, to_step,
                left_out
    final       validation_loss, validation_loss_per_byte, baselines (nats/byte by name), sample, train_s

Fields of `train` that need a word:

    mtp_losses      cross-entropy of each depth of multi-token prediction, unweighted; absent without depths
    loss_scale      what the loss of this step was multiplied by; grad_norm is that of the true gradients
    overflows       updates skipped so far because a gradient was not finite somewhere
    *_loss          balance losses that have a weight: unweighted means over sequences and layers with experts
    model_tflops    products of the model, TFLOP/s a rank (`octofold.train.flops` says what counts)
    mfu             time that an ideal device needs for those ÷ time taken; where the device's peaks are known
    precision_health
                    of tensors quantised to FP8, at the last sampled step since the record before; absent if there is
                    none. Dict from kind (activation, weight, gradient) to dict from module to the metrics
        underflow           share of the elements that are not zero and became zero
        saturation          share of the elements beyond the largest that their scale can express, and so clipped
        amax                largest magnitude; inf where some element was not finite
        scale_spread        log2 of the largest scale ÷ the smallest, over tiles that are not all zero
        snr_db              10 log10 of Σ x² ÷ Σ (x − quantised x)²; inf where nothing was rounded
        non_finite_tiles    tiles that hold NaN or an infinity, summed over uses and ranks; their elements count nowhere
                            else
    sent_bytes      that all ranks sent to other ranks' experts in a step: dict of dispatch and combine_gradient (to
                    the experts), combine and dispatch_gradient (back); absent where every rank has all experts
    network_bytes   those of them that went to ranks of other nodes; absent where none did
    dropped_tokens  copies of tokens that found no place at their expert in a step, over all ranks and layers; absent
                    without parallel.expert_capacity
    communication   collectives of a step, summed over all ranks: dict from group/collective (`expert/all_to_all`; a
                    group of all ranks is `world`) to a dict; absent under train.log_communication=false
        calls
        bytes               that ranks send (`octofold.backends.accounting` says how they are counted), by class of
                            link: node, supernode, network (`octofold.backends.topology`)
        seconds             from each call until it was complete, other ranks' delay included; calls overlap with one
                            another and with computation; absent on accelerators
    compute_s       seconds a step that ranks compute, without what they wait in collectives: `median` and `slowest`;
                    absent of one rank, and on accelerators
    slow_ranks      dict from rank to how many times as long as the median of its pipeline stage it computes, of ranks
                    beyond train.slow_rank_factor; absent where there is none, and in the first record of a process
    imbalance       busiest expert's load ÷ mean load in the layer where it is largest
    unused_experts  experts that no token chose, counted over all layers
    balance         dict of `imbalance`, `unused_share` and `load_entropy`, each a dict from layer to number
                    (`octofold.parallel.balance.load_metrics`)
    expert_load     dict from layer to the experts' shares of the load, which sum to 1

The last four are absent where no layer has experts.

Fields of `anomaly`, a step that was not applied or copies that differ (docs/faults.md):

    what            not_finite, spike, recheck (two passes differ) or replicas (copies differ)
    number, value   what is wrong with a step: loss or gradient norm, and what it is; `usual`: what a spike stands above
    cause           weights, data or model, data or weights, device, replicas
    ranks, layer, direction
                    where it first went wrong, forward or backward; null or empty where that could not be told
    samples         global samples that carried it; `origins`: of the first of them, where they come from: number in
                    the packed split, first and last document there
    account         all of it in a sentence
    action          skipped, rolled_back (to the checkpoint of `to_step`, and the global samples from the first number
                    of `left_out` to below the second are never given out again) or stopped

A run that has gone back has its later records removed but for those of kind `anomaly`, which come before what is
trained again.

JSON has no NaN or infinity. Such a value is written as `null` and named in the record's `non_finite` field, a dict from
its path (`loss`, `expert_load/3/0`) to `nan`, `inf` or `-inf`; `read_metrics` puts it back.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from octofold.backends.errors import UserError
from octofold.train.lines import LineFile

METRICS_FILE = "metrics.jsonl"
HEALTH_METRICS = ("underflow", "saturation", "amax", "scale_spread", "snr_db", "non_finite_tiles")
"""Of each module in `precision_health`."""
_TRACK_REMEDY = "pip install 'octofold[track]'"
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go besides the file."""

    def log(self, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        """Take one record's numbers and texts, named `kind/field`."""

    def close(self) -> None:
        """Write out what is held back."""


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl` and hands them to the sinks; for one process of a job (rank 0)."""

    def __init__(
        self,
        run_dir: Path,
        *,
        run_name: str,
        config: dict[str, Any],
        wandb: bool,
        tensorboard: bool,
        resumed_step: int | None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """
        Args:
            run_dir: the run's folder; made if it does not exist.
            run_name: a word for people.
            config: the job's configuration as plain values, for Weights & Biases.
            wandb: also log to Weights & Biases.
            tensorboard: also write `run_dir/tensorboard`.
            resumed_step: the step the run continues from. Records of later steps are dropped, since those steps are
                about to be repeated. None starts afresh: an earlier file is set aside as `metrics-1.jsonl`, `-2`, ...
            warn: is told when the file cannot be written for a time.

        Raises:
            UserError: a sink is not installed or cannot start, or the file cannot be opened or brought to that step.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[Sink] = []
        if wandb:
            self._sinks.append(_WandbSink(run_dir, run_name, config, resumed_step))
        if tensorboard:
            self._sinks.append(_TensorBoardSink(run_dir, resumed_step))
        path = run_dir / METRICS_FILE
        try:
            if path.exists():
                if resumed_step is None:
                    _set_aside(path)
                else:
                    _keep_until(run_dir, resumed_step)
            self._path, self._warn, self._file = path, warn, LineFile(path, warn)
        except OSError as error:
            remedy = "free space or change permissions, then start again"
            raise UserError(f"{path} cannot be written: {error.strerror}\n  remedy: {remedy}") from error

    def log(self, record: dict[str, Any]) -> None:
        """Write one record of plain values; it is in the operating system's hands when this returns.

        On a full disk it waits in memory, with a warning, until a later call finds room.

        Raises:
            TypeError: a value that JSON does not know, such as a tensor; nothing is written then.
        """
        self._file.append(_encode(record))
        if self._sinks:
            scalars, texts = _flatten(record)
            for sink in self._sinks:
                sink.log(record["step"], scalars, texts)

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: remove later records; sinks are told again of what is trained again."""
        self._file.close()
        _keep_until(self._path.parent, step)
        self._file = LineFile(self._path, self._warn)

    def close(self) -> None:
        """Close the file and the sinks; may be called twice."""
        self._file.close()
        while self._sinks:
            self._sinks.pop().close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; an empty list where the run has none.

    A last line torn by a crash is passed over in silence; any other line that is no record is named in the log.
    """
    path = run_dir / METRICS_FILE
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate([*lines, tail], start=1):
        record = _decode(line)
        if record is not None:
            records.append(record)
        elif number <= len(lines):
            _log.warning("%s, line %d is not a record; skipped", path, number)
    return records


def worst(metric: str, of_modules: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """The module with the worst value of a metric of `precision_health`, and the value; NaN is worse than any.

    Args:
        of_modules: module -> metrics, of one kind of tensor; at least one.
    """

    def badness(module: str) -> float:
        value = of_modules[module][metric]
        return math.inf if math.isnan(value) else -value if metric == "snr_db" else value

    module = max(of_modules, key=badness)
    return module, of_modules[module][metric]


def _encode(record: dict[str, Any]) -> str:
    non_finite = {"/".join(path): str(value) for path, value in _leaves(record) if _is_non_finite(value)}
    if non_finite:
        record = {**_without_non_finite(record), "non_finite": non_finite}
    return json.dumps(record, allow_nan=False)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record on a line, its non-finite values restored; None where the line holds no record."""
    try:
        record = json.loads(line)
        if not isinstance(record["kind"], str) or not isinstance(record["step"], int):
            return None
        for path, value in record.pop("non_finite", {}).items():
            *parents, last = path.split("/")
            holder: Any = record
            for key in parents:
                holder = holder[int(key) if isinstance(holder, list) else key]
            holder[int(last) if isinstance(holder, list) else last] = float(value)
    except (ValueError, LookupError, AttributeError, TypeError):  # no JSON, no UTF-8, or not our fields
        return None
    return record


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar inside nested dicts and lists, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _leaves(child, (*path, str(index)))
    else:
        yield path, value


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(child) for child in value]
    return None if _is_non_finite(value) else value


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    path.rename(target)


def _keep_until(run_dir: Path, step: int) -> None:
    """Drop later steps and torn lines; a crash leaves the old file or the new one.

    Later steps stand at the end, and the file is cut there, for which a full disk has room. Only where others follow
    them, or a line is torn in the middle, is the file written anew. An anomaly after which the run went back stays: its
    batch does not come again to tell of it.
    """
    path = run_dir / METRICS_FILE
    end, rest = 0, path.read_bytes()
    while rest:
        line, newline, after = rest.partition(b"\n")
        record = _decode(line)
        if record is None or not _stays(record, step) or not newline:
            break
        end, rest = end + len(line) + 1, after
    if not any((record := _decode(line)) and _stays(record, step) for line in rest.split(b"\n")):
        os.truncate(path, end)
        return
    kept = [record for record in read_metrics(run_dir) if _stays(record, step)]
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(_encode(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _stays(record: dict[str, Any], step: int) -> bool:
    return record["step"] <= step or record.get("action") == "rolled_back"


def _flatten(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """A record's numbers and texts named `kind/field`, how evenly each layer's experts are used as `name/layer_N`, and
    the health of FP8 tensors as `tensor_metric/module`, the worst module's as `precision/tensor_metric_worst`.

    The experts' single loads stay in the file: a large model has tens of thousands.
    """
    scalars: dict[str, float] = {}
    texts: dict[str, str] = {}
    kind = record["kind"]
    if kind == "anomaly":
        return {}, {"anomaly": f"step {record['step']}: {record['account']}; {record['action']}"}
    for kind_of_tensor, of_modules in record.get("precision_health", {}).items():
        for module, metrics in of_modules.items():
            scalars |= {f"{kind_of_tensor}_{metric}/{module}": value for metric, value in metrics.items()}
        for metric in HEALTH_METRICS if of_modules else ():
            scalars[f"precision/{kind_of_tensor}_{metric}_worst"] = worst(metric, of_modules)[1]
    for name, of_layers in record.get("balance", {}).items():
        scalars |= {f"{name}/layer_{layer}": value for layer, value in of_layers.items()}
    for depth, loss in enumerate(record.get("mtp_losses", []), start=1):
        scalars[f"{kind}/mtp_loss_{depth}"] = loss
    nested = ("precision_health", "balance", "mtp_losses", "expert_load")
    rest = {key: value for key, value in record.items() if key not in ("kind", "step", *nested)}
    for path, value in _leaves(rest):
        name = "/".join((kind, *path))
        if isinstance(value, str):
            texts[name] = value
        elif value is not None:
            scalars[name] = value
    return scalars, texts


class _WandbSink:
    """Weights & Biases: online where somebody is logged in, else offline files in `run_dir/wandb`."""

    def __init__(self, run_dir: Path, run_name: str, config: dict[str, Any], resumed_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"train.wandb=true: {error}\n  remedy: {_TRACK_REMEDY}, or train.wandb=false") from error
        try:
            # The user's WANDB_MODE has the last word. `login` only looks for credentials here: no prompt, no network.
            mode: Literal["online", "offline"] | None = None
            if "WANDB_MODE" not in os.environ:
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            # Each start is a run of its own in one group: W&B refuses steps that it has already seen.
            self._run = wandb.init(
                project="octofold",
                name=run_name if resumed_step is None else f"{run_name}-from-{resumed_step}",
                group=run_dir.resolve().name,
                dir=str(run_dir),
                config=config,
                mode=mode,
                # Its console capture would fight with the progress bar.
                settings=wandb.Settings(console="off", init_timeout=30),
            )
        except wandb.Error as error:
            remedy = "set WANDB_MODE=offline and `wandb sync` later, or train.wandb=false"
            raise UserError(f"train.wandb=true: Weights & Biases: {error}\n  remedy: {remedy}") from error

    def log(self, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        self._run.log(scalars, step=step)
        for name, text in texts.items():
            self._run.summary[name] = text

    def close(self) -> None:
        self._run.finish()


class _TensorBoardSink:
    """TensorBoard event files in `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = f"train.tensorboard=true: {error}\n  remedy: {_TRACK_REMEDY}, or train.tensorboard=false"
            raise UserError(message) from error
        # Readers hide events from purge_step on: a curve that is about to be drawn again.
        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)  # an indented block is code

    def close(self) -> None:
        self._writer.close()
