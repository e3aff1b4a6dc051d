"""What a person sees of a run: the start-up table, progress, validation, and the closing comparison. Torch-free.

A terminal gets a live progress bar; a file or pipe gets plain lines that `grep` can use. Ranks other than 0 hold a
`Console(enabled=False)`, which prints nothing. Losses are in nats.
"""

import io
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from octofold.train.metrics import METRICS_FILE

PLAIN_WIDTH = 120
_RATE_WINDOW = 20
"""Updates that the time left is estimated from: enough to be steady, few enough to forget a slow start."""


class Console:
    """Prints for one process of a job."""

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        """
        Args:
            enabled: False makes every method silent, for the ranks that do not report.
            stream: where to print; None is standard output.
        """
        stream = stream or sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            # A run must not end because its sample holds a character that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
        on_terminal = stream.isatty()
        self._rich = RichConsole(
            file=stream, quiet=not enabled, highlight=False, width=None if on_terminal else PLAIN_WIDTH
        )
        # rich also calls a pipe a terminal where FORCE_COLOR is set; a live bar would fill such a log with copies.
        self._live = enabled and on_terminal and self._rich.is_interactive

    def startup(self, title: str, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Print what was decided, once: a table of rows under section names; integers get thousands separators."""
        table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, rows in sections.items():
            for number, (name, value) in enumerate(rows.items()):
                table.add_row(escape(section) if number == 0 else "", escape(name), escape(_value(value)))
        self._print()
        self._rich.print(table)
        self._print()

    @contextmanager
    def progress(self, total_steps: int, start_step: int) -> Iterator["RunProgress"]:
        """Progress from `start_step` (steps already done) to `total_steps`; feed it with `update`."""
        if not self._live:
            yield RunProgress(partial(self._line, total_steps), total_steps, start_step)
            return
        bar = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("left {task.fields[left]}"),
            console=self._rich,
            expand=True,
            refresh_per_second=4,
        )
        task = bar.add_task("train", total=total_steps, completed=start_step, left="?")
        with bar:

            def show(step: int, fields: list[str], left: str) -> None:
                bar.figures = "  ".join(fields)
                bar.update(task, completed=step, left=left)

            yield RunProgress(show, total_steps, start_step)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Print a validation record (`loss` in nats/token, `loss_per_byte` in nats/byte) as one line."""
        self._print(
            f"validation  step {record['step']}  loss {_number(record['loss'], '.4f')} nats/token  "
            f"{_number(record['loss_per_byte'], '.4f')} nats/byte  {_number(record['tokens'], ',')} tokens"
        )

    def final(self, record: Mapping[str, Any], *, run_dir: Path, checkpoint: object | None) -> None:
        """Print how a run ended: the loss beside the baselines, the sample, what was written and how to go on.

        Args:
            record: a `final` record (see `octofold.train.metrics`).
            run_dir: the run's folder.
            checkpoint: path or URL of the last checkpoint; None where none was saved.
        """
        self._print()
        self._rich.print(_comparison(record))
        self._print(verdict(record))
        if sample := record.get("sample"):
            self._print()
            self._rich.rule("sample", align="left", characters="-", style="dim")
            self._print(printable(sample))
            self._rich.rule(characters="-", style="dim")
        run = shlex.quote(str(run_dir))
        paths = {"run folder": run_dir, "checkpoint": checkpoint, "metrics": run_dir / METRICS_FILE}
        commands = {
            "sample": f'octofold sample {run} "def "',
            "plots": f"octofold report {run}",
            "train on": f"octofold train resume={run} train.steps={2 * record['step']}",
        }
        self._print()
        for name, text in {**paths, **commands}.items():
            if text is not None:
                self._print(f"{name:<12}{text}")

    def info(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Print a line that should not be overlooked."""
        self._print(f"warning: {text}", style="yellow")

    def _line(self, total_steps: int, step: int, fields: list[str], left: str) -> None:
        self._print("  ".join([f"step {step}/{total_steps}", *fields, f"left {left}"]))

    def _print(self, text: str = "", style: str = "") -> None:
        """Print text as it is: no markup, and no wrapping, so that paths stay whole."""
        self._rich.print(Text(text, style=style), soft_wrap=True)
        self._rich.file.flush()


class RunProgress:
    """Turns `train` records into what is shown, and estimates the time left."""

    def __init__(self, show: Callable[[int, list[str], str], None], total_steps: int, start_step: int) -> None:
        """`show(step, fields, time_left)` displays one update."""
        self._show, self._total_steps = show, total_steps
        self._seen = deque([(start_step, time.monotonic())], maxlen=_RATE_WINDOW)

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a `train` record; a field it lacks is left out, a value that is not finite is shown as it is."""
        step = record["step"]
        self._seen.append((step, time.monotonic()))
        forms = {
            "loss": ("loss {}", ".3f"),
            "lr": ("lr {}", ".1e"),
            "grad_norm": ("grad norm {}", ".2f"),
            "imbalance": ("imbalance {}", ".2f"),
            "tokens_per_s": ("{} tokens/s", ",.0f"),
            "mfu": ("MFU {}", ".1%"),
        }
        fields = [text.format(_number(record[name], form)) for name, (text, form) in forms.items() if name in record]
        self._show(step, fields, _duration(self._left_s()))

    def _left_s(self) -> float:
        (first_step, first_s), (last_step, last_s) = self._seen[0], self._seen[-1]
        if last_step <= first_step:
            return math.nan
        return (last_s - first_s) / (last_step - first_step) * max(0, self._total_steps - last_step)


class _Bar(Progress):
    """A progress bar with a line of figures below it, so that both fit a narrow terminal."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


def verdict(record: Mapping[str, Any]) -> str:
    """One sentence on a `final` record: the model against the trigram model, in nats a byte."""
    loss, trigram = record["validation_loss_per_byte"], record.get("baselines", {}).get("trigram")
    if loss is None or not math.isfinite(loss):
        return "The validation loss is not finite: the run has diverged."
    if trigram is None or not math.isfinite(trigram):
        return "There is no trigram model to compare with."
    side = "better" if loss < trigram else "worse"
    return f"The model is {side} than the trigram model by {abs(trigram - loss):.3f} nats/byte."


def printable(text: str) -> str:
    """The text with control characters and lone surrogates replaced: a byte model may emit terminal commands."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def _comparison(record: Mapping[str, Any]) -> Table:
    """Validation loss beside the n-gram models on the same split."""
    table = Table(title="Validation", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("nats/byte", justify="right")
    table.add_column("model - it", justify="right")
    loss = record["validation_loss_per_byte"]
    for name, baseline in record.get("baselines", {}).items():
        gap = math.nan if loss is None or baseline is None else loss - baseline
        table.add_row(escape(f"{name} bytes"), _number(baseline, ".4f"), _number(gap, "+.4f"))
    tokens = f"model ({_number(record['validation_loss'], '.4f')} nats/token)"
    table.add_row(tokens, _number(loss, ".4f"), "", style="bold")
    return table


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    """Seconds as 4:12 or 1:04:12; ? where they are not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"
