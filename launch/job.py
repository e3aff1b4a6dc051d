"""What `octofold train` is to run: a new job, or one that continues a saved run. Nothing is started or written here."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from octofold.backends.errors import ConfigError
from octofold.launch.compose import apply, compose, parse
from octofold.launch.config import JobConfig
from octofold.launch.config import check as check_launch
from octofold.launch.run_folder import checkpoints, has_checkpoint, read_config
from octofold.train.config import validate
from octofold.train.models.config import ModelConfig

# What a continued run may change by itself; all else would make the saved model, optimiser or data order another one's.
FREE_KEYS = re.compile(
    r"(name|run_dir|resume|launch\..*|checkpoint\..*|train\.(steps|log_every|eval_every|(final_)?eval_sequences|sample_prompt"
    r"|sample_tokens|log_communication|wandb|tensorboard)|backend\.(threads|timeout_s)|data\.(workers|cache_dir))"
)


@dataclass(frozen=True)
class Job:
    """A job after every rule that needs neither torch nor a device."""

    config: JobConfig
    """`resume` is None for a run that begins at step 0, else the absolute path of the run or checkpoint to continue."""
    reuse_folder: bool
    """Whether the run's folder may hold a run already."""


def draft(texts: Sequence[str], config_dirs: Sequence[str] = ()) -> JobConfig:
    """The job as the overrides describe it, typed, before any rule that binds several keys.

    With `resume=RUN` that is RUN's saved job with the overrides on top, otherwise what `compose` makes of them.

    Args:
        texts: overrides in Hydra's grammar.
        config_dirs: folders with further options of the groups.

    Raises:
        UserError: an override that cannot be honoured, or a run that cannot be continued.
    """
    asked = [override.value() for override in parse(texts) if override.key_or_group == "resume"]
    if asked and asked[-1] not in (None, "auto", "???"):
        return _continued(str(asked[-1]), texts)
    config = compose(texts, config_dirs)
    if config.resume not in (None, "auto"):
        raise ConfigError("resume", config.resume, "a run is named on the command line", f"resume={config.resume}")
    return config


def settle(
    texts: Sequence[str],
    config_dirs: Sequence[str] = (),
    world_size: int | None = None,
    model: ModelConfig | None = None,
) -> Job:
    """The job to run, proved.

    Args:
        texts: overrides in Hydra's grammar.
        config_dirs: folders with further options of the groups.
        world_size: ranks that a launcher has started; None: launch.nproc_per_node will be.
        model: replaces the composed one.

    Raises:
        UserError: see `draft`; besides, a rule that binds several keys.
    """
    config = _absolute(draft(texts, config_dirs))
    config = config if model is None else replace(config, model=model)
    check_launch(config.launch)
    checked = validate(config, world_size or config.launch.nproc_per_node)
    assert isinstance(checked, JobConfig)
    if checked.resume == "auto":
        return Job(_automatic(checked), reuse_folder=True)
    return Job(checked, reuse_folder=checked.resume is not None)


def _absolute(config: JobConfig) -> JobConfig:
    """Paths of data made absolute, so that a run can be continued from any working directory."""

    def full(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    data = replace(config.data, cache_dir=full(config.data.cache_dir))
    # A hub dataset's name stays as it is unless it is a folder here.
    if data.path and (data.source != "hub" or Path(data.path).expanduser().exists()):
        data = replace(data, path=full(data.path))
    if Path(data.tokenizer).expanduser().exists() and data.tokenizer not in ("bytes", "bpe"):
        data = replace(data, tokenizer=str(full(data.tokenizer)))
    return replace(config, data=data)


def _continued(asked: str, texts: Sequence[str]) -> JobConfig:
    """The saved job of a named run or checkpoint, with the user's values on top."""
    path = Path(asked).expanduser().absolute()
    is_checkpoint = path.parent.name == "checkpoints"
    run_dir = path.parent.parent if is_checkpoint else path
    saved = read_config(run_dir)
    found = checkpoints(run_dir)
    if not found:
        rule, remedy = "the run has saved no checkpoint", f"start it over with run_dir={run_dir} resume=auto"
        raise ConfigError("resume", asked, rule, remedy)
    if is_checkpoint and path not in found:
        names = ", ".join(checkpoint.name for checkpoint in found)
        raise ConfigError("resume", asked, f"the run's checkpoints are: {names}", f"resume={found[-1]}")
    # The saved degree was inferred from the ranks of that day; the ranks of today may be others.
    saved = replace(saved, parallel=replace(saved.parallel, data_shard=-1))
    config = apply(saved, [override for override in parse(texts) if override.key_or_group != "resume"])
    if config.run_dir != saved.run_dir and Path(str(config.run_dir)).expanduser().absolute() != run_dir:
        shown = f"resume={asked} run_dir={config.run_dir}"
        raise ConfigError("run_dir", shown, "a continued run stays in its folder", "leave run_dir out")
    return replace(config, run_dir=str(run_dir), resume=str(path))


def _automatic(config: JobConfig) -> JobConfig:
    """The job of `resume=auto`: go on in run_dir where it holds a checkpoint, else begin there."""
    if config.run_dir is None:
        rule = "resume=auto looks for a checkpoint in run_dir, and run_dir=null makes a new folder each time"
        raise ConfigError("resume", "auto", rule, "add run_dir=FOLDER")
    run_dir = Path(config.run_dir).expanduser().absolute()
    if not has_checkpoint(run_dir):
        return replace(config, resume=None)
    before, now = _flat(asdict(read_config(run_dir))), _flat(asdict(config))
    changed = [key for key in now if before[key] != now[key] and not FREE_KEYS.fullmatch(key)]
    if changed:
        shown = "\n  ".join(f"{key}={now[key]} (saved: {before[key]})" for key in changed)
        rule = f"{run_dir} holds a run with other values, and resume=auto continues only the same run"
        remedy = (
            f"leave these values as they were, name another run_dir, or force them: resume={config.run_dir} KEY=VALUE"
        )
        raise ConfigError("resume", shown, rule, remedy)
    return replace(config, resume=str(run_dir))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
