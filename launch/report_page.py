"""The page of a report: one HTML file with the plots inside it, to be mailed or opened from anywhere."""

import base64
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from octofold.launch.report_plots import Records, column, last_of_kind, of_kind
from octofold.launch.report_precision import worst_modules
from octofold.train.console import printable, verdict

MAIN_KEYS = {
    "model": "name hidden_size num_hidden_layers num_attention_heads n_routed_experts n_shared_experts "
    "num_experts_per_tok",
    "data": "source path tokenizer sequence_length",
    "train": "steps global_batch_size micro_batch_size seed",
    "optim": "lr schedule warmup_steps weight_decay clip_norm",
    "precision": "name arithmetic",
    "parallel": "data_replicate data_shard expert",
    "backend": "name",
    "launch": "nproc_per_node",
}
"""The configuration's values worth a look, by group."""

_STYLE = """
:root { color-scheme: light dark; --edge: #8884; --quiet: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid var(--edge); }
th { font-weight: normal; opacity: .75; }
td { font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
img { width: 100%; height: auto; background: white; border: 1px solid var(--edge); border-radius: 6px; }
pre { background: var(--quiet); padding: 1rem; overflow-x: auto; border-radius: 6px; white-space: pre-wrap; }
"""


def write_page(records: Records, config: dict[str, Any], run_name: str, plots: list[Path], path: Path) -> Path:
    """Write the page and return its path.

    Args:
        records: a run's records, with at least one of kind `train`.
        config: the run's configuration, nested by group; may be empty.
        run_name: the heading.
        plots: PNG files to embed; one called `overview.png` stays out, since the page shows its parts.
        path: where the page goes.
    """
    final = last_of_kind(records, "final")
    images = "\n".join(_image(plot) for plot in plots if plot.name != "overview.png")
    parts = [
        f"<h1>{escape(printable(run_name))}</h1>",
        f"<p>{escape(verdict(final) if final else 'This run has not ended yet.')}</p>",
        _table(_numbers(records)),
        f'<h2>Plots</h2>\n<div class="plots">\n{images}\n</div>',
    ]
    if worst := worst_modules(records):
        parts.append(f"<h2>Worst FP8 modules at step {worst[0]:,}</h2>\n{_table(worst[1])}")
    if final and final.get("sample"):
        parts.append(f"<h2>Sample</h2>\n<pre>{escape(printable(final['sample']))}</pre>")
    if rows := _main_values(config):
        parts.append(f"<h2>Configuration</h2>\n{_table(rows)}")
    body = "\n".join(parts)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(printable(run_name))} · Octofold</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def _numbers(records: Records) -> dict[str, str]:
    """What the run came to, as rows of a table."""
    train = of_kind(records, "train")
    last, final, validation = train[-1], last_of_kind(records, "final"), last_of_kind(records, "validation")
    rows = {
        "steps": f"{last['step']:,}",
        "tokens seen": f"{last['tokens']:,}",
        "training loss": f"{_number(last['loss'])} nats/token",
    }
    if newest := final or validation:
        prefix = "validation_" if final else ""
        a_token, a_byte = (_number(newest[f"{prefix}{key}"]) for key in ("loss", "loss_per_byte"))
        rows["validation loss"] = f"{a_token} nats/token, {a_byte} nats/byte (step {newest['step']:,})"
    if final:
        for name, loss in final.get("baselines", {}).items():
            rows[f"{name} bytes"] = f"{_number(loss)} nats/byte"
        rows["training time"] = f"{final['train_s'] / 60:,.1f} minutes"
    rates = {"throughput": ("tokens_per_s", ",.0f", " tokens/s")}
    rates |= {"model FLOP/s": ("model_tflops", ",.3g", " TFLOP/s a rank"), "MFU": ("mfu", ".1%", "")}
    for name, (key, form, unit) in rates.items():
        values = column(train, key)
        if (finite := values[np.isfinite(values)]).size:
            rows[name] = f"{np.median(finite):{form}}{unit} (median)"
    if "imbalance" in last:
        rows["busiest expert"] = f"{_number(last['imbalance'], '.2f')} × mean load"
    if entropies := last.get("balance", {}).get("load_entropy"):
        rows["entropy of expert load"] = f"{_number(min(entropies.values()), '.3f')} of 1 in the least even layer"
    if "unused_experts" in last:
        rows["unused experts"] = str(last["unused_experts"])
    return rows


def _main_values(config: dict[str, Any]) -> dict[str, str]:
    """The configuration's main values by dotted key, those that are there and say something."""
    rows: dict[str, str] = {}
    for group, names in MAIN_KEYS.items():
        values = config.get(group) or {}
        rows |= {f"{group}.{name}": str(values[name]) for name in names.split() if values.get(name) is not None}
    return rows


def _number(value: float | None, form: str = ".4f") -> str:
    return "unknown" if value is None or math.isnan(value) else format(value, form)


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def _image(plot: Path) -> str:
    data = base64.b64encode(plot.read_bytes()).decode("ascii")
    return f'<img alt="{escape(plot.stem.replace("_", " "))}" src="data:image/png;base64,{data}">'
