"""`octofold report`: plots of a run and one page that holds them all, from what the run wrote. Works while it runs."""

from pathlib import Path
from typing import Any

from octofold.backends.errors import UserError
from octofold.train.metrics import METRICS_FILE, read_metrics


def report(run_dir: Path) -> list[Path]:
    """Draw a run into `run_dir/report/`: one PNG a plot, `overview.png`, and a self-contained `index.html`.

    Args:
        run_dir: a run's folder with `metrics.jsonl` and, as a rule, `config.yaml`.

    Returns:
        The files written, the page last.

    Raises:
        UserError: the folder holds no training records, or a `config.yaml` that cannot be read.
    """
    from octofold.launch.report_page import write_page
    from octofold.launch.report_plots import PLOTS, draw_all
    from octofold.launch.report_precision import precision_plots

    if not (run_dir / METRICS_FILE).is_file():
        raise UserError(
            f"{run_dir}: not a run folder\n  rule:   a run writes {METRICS_FILE} into its folder\n"
            "  remedy: octofold report RUN, where RUN is the folder that the training printed"
        )
    records = read_metrics(run_dir)
    if not any(record["kind"] == "train" for record in records):
        raise UserError(
            f"{run_dir / METRICS_FILE}: no training records yet\n  rule:   a report needs at least one\n"
            "  remedy: wait for train.log_every steps, or look at the run's output for why it stopped"
        )
    config = _read_config(run_dir / "config.yaml")
    name = str(config.get("name", run_dir.resolve().name))
    report_dir = run_dir / "report"
    report_dir.mkdir(exist_ok=True)
    paths = draw_all(records, {**PLOTS, **precision_plots(records)}, name, report_dir)
    return [*paths, write_page(records, config, name, paths, report_dir / "index.html")]


def _read_config(path: Path) -> dict[str, Any]:
    """The run's resolved configuration; empty where the run left none."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    if not path.exists():
        return {}
    remedy = "restore the file, or delete it to report without a configuration"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read\n  rule:   {error}\n  remedy: {remedy}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a configuration\n  rule:   it maps keys to values\n  remedy: {remedy}")
    return config
