"""`octofold import` and `octofold export`: Hugging Face checkpoints both ways."""

import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.launch.job import settle
from octofold.launch.run_folder import make_run_folder, read_config, saved_checkpoints, write_config
from octofold.train.checkpoint.folders import folder_at

OWN_MODEL_KEYS = re.compile(r"model\.(name|balance\..*|mtp\..*|initializer_range|num_nextn_predict_layers)")
"""What an import may be told about the model; all else stands in config.json."""


def import_checkpoint(folder: str, overrides: list[str]) -> Path:
    """Make a run whose step 0 holds the weights of a Hugging Face checkpoint; returns the run folder.

    Args:
        overrides: as `octofold train` takes them, for the run that begins there.

    Raises:
        UserError: the checkpoint, an override or the disk cannot serve. Nothing half-written is left behind.
    """
    from octofold.launch.compose import apply, parse

    of_model: list[str] = []
    of_run: list[str] = []
    for text, override in zip(overrides, parse(overrides), strict=True):
        key = override.key_or_group
        if key == "resume":
            raise ConfigError("resume", text, "an import begins a run", "leave it out")
        if key.partition(".")[0] == "model" and not OWN_MODEL_KEYS.fullmatch(key):
            rule = "the model is what the checkpoint's config.json says"
            raise ConfigError(key, text, rule, "leave it out; model.balance, model.mtp and model.name are free")
        (of_model if key.startswith("model.") else of_run).append(text)
    from octofold.train.hf_import import SOURCE, depths_present, import_weights, keep_files, open_source

    source_dir = Path(folder).expanduser().absolute()
    source = open_source(source_dir)
    model = apply(JobConfig(model=source.model), parse(of_model)).model
    told, depths = source.model.num_nextn_predict_layers, depths_present(source)
    if model.num_nextn_predict_layers not in (0, told):
        rule = f"config.json tells of {told} layer(s) of multi-token prediction, of which all or none are read"
        raise ConfigError(
            "model.num_nextn_predict_layers",
            model.num_nextn_predict_layers,
            rule,
            "model.num_nextn_predict_layers=0, or leave it out",
        )
    if model.num_nextn_predict_layers > depths:
        print(
            f"octofold: config.json tells of {told} layer(s) of multi-token prediction, and the files hold none; "
            "the run has model.num_nextn_predict_layers=0",
            file=sys.stderr,
        )
        model = replace(model, num_nextn_predict_layers=0)
    config = settle(of_run, model=model).config
    if not any(override.key_or_group == "name" for override in parse(of_run)):
        config = replace(config, name=f"import-{source_dir.name}")
    fresh = config.run_dir is None or not Path(config.run_dir).expanduser().exists()
    run_dir = make_run_folder(config)
    try:
        tokenizer = keep_files(source_dir, run_dir)
        if tokenizer is not None:
            config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
        import_weights(source, config.model, run_dir)
        write_config(run_dir, replace(config, run_dir=str(run_dir)))
    except BaseException:
        for leftover in (SOURCE, "tokenizer", "checkpoints"):
            shutil.rmtree(run_dir / leftover, ignore_errors=True)
        if fresh:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return run_dir


def export_run(run: str, overrides: list[str]) -> Path:
    """Write a checkpoint of a run as a Hugging Face folder; returns the folder.

    Args:
        run: a run folder (its newest checkpoint) or RUN/checkpoints/step_N.

    Raises:
        UserError: the run, an override or the disk cannot serve. Nothing half-written is left behind.
    """
    from octofold.launch.compose import apply, parse
    from octofold.train.hf_export import ExportConfig, check, export_weights

    @dataclass(frozen=True)
    class ExportJob:
        """The root of the `export` keys, so that they are written export.precision=fp8."""

        export: ExportConfig = field(default_factory=ExportConfig)

    settings = apply(ExportJob(), parse(overrides)).export
    check(settings)
    path = Path(run).expanduser().absolute()
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path
    config = read_config(run_dir)
    found = saved_checkpoints(run_dir, config.checkpoint.dir)
    if not found or (path != run_dir and folder_at(path) not in found):
        names = ", ".join(checkpoint.name for checkpoint in found) or "none"
        raise UserError(
            f"{path} is no checkpoint\n  rule:   the run's checkpoints are: {names}\n"
            "  remedy: name the run, or one of them"
        )
    return export_weights(run_dir, folder_at(path) if path != run_dir else found[-1], config, settings)
