"""One folder a run: where it lies, and its `config.yaml`, which the starting process writes and every rank reads.

    config.yaml   metrics.jsonl   checkpoints/step_N/   logs/

`config.yaml` holds every key, resolved. It is OmegaConf's YAML, so a literal `${` inside a text stands as `\\${`.
Torch-free.
"""

import os
import re
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped, unused-ignore]

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.config import JobConfig
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.validity import checkpoints_of, step_folders, valid_checkpoints

CONFIG_NAME = "config.yaml"
RUNS = Path("runs")
"""Where runs without a run_dir of their own lie, from the working directory."""
# The file that makes a step folder a checkpoint: octofold.train.checkpoint.manifest.MANIFEST, which needs torch.
MANIFEST = "manifest.json"
# What OmegaConf raises for a file, a key or a value it cannot take.
CONFIG_ERRORS = (OmegaConfBaseException, YAMLError, TypeError, ValueError, AttributeError)


def schema_node(schema: type) -> DictConfig:
    """A typed node with the defaults of a frozen dataclass, open to merging: OmegaConf makes frozen ones read-only."""
    node = OmegaConf.structured(schema)
    _unlock(node)
    return node


def _unlock(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)
    for child in node.values():
        if isinstance(child, DictConfig):
            _unlock(child)
            if OmegaConf.get_type(child) is dict:
                # A mapping whose keys are the user's: Hydra would take none that the default lacks.
                OmegaConf.set_struct(child, False)


def config_node(config: Any) -> DictConfig:
    """A typed node with the values of a frozen dataclass instance, texts kept literally."""
    return OmegaConf.merge(schema_node(type(config)), _literal(asdict(config)))  # type: ignore[return-value]


def _literal(value: Any) -> Any:
    """The value with `${` escaped, and the backslashes before it, so that OmegaConf sees text and no interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def to_yaml(config: JobConfig) -> str:
    """The job as `config.yaml` holds it."""
    return OmegaConf.to_yaml(config_node(config))


def read_config(run_dir: Path) -> JobConfig:
    """The job saved in a run folder.

    Raises:
        UserError: the folder holds no run, or its config.yaml does not fit this version's keys and types.
    """
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        remedy = f"  rule:   a run folder holds {CONFIG_NAME}\n  remedy: name a folder that `octofold train` made"
        raise UserError(f"{run_dir} holds no run\n{remedy}")
    try:
        saved = OmegaConf.load(path)
        config = OmegaConf.to_object(OmegaConf.merge(schema_node(JobConfig), saved))
    except (OSError, *CONFIG_ERRORS) as error:
        reason = str(error).splitlines()[0]
        rule = f"  rule:   it must hold this version's keys and types: {reason}"
        raise UserError(f"{path} cannot be read\n{rule}\n  remedy: mend that line, or start a new run") from error
    assert isinstance(config, JobConfig)
    return config


def with_saved_values(config: JobConfig, saved: dict[str, Any]) -> JobConfig:
    """A job with the values that a manifest tells of (`made_by["config"]`); the others, and all where they do not fit
    this version's types, stay as they are."""
    node = config_node(config)
    try:
        known = _known(_literal(saved), node)
        values = OmegaConf.to_object(OmegaConf.merge(node, known))
    except CONFIG_ERRORS:
        return config
    assert isinstance(values, JobConfig)
    return values


def _known(values: dict[str, Any], node: DictConfig) -> dict[str, Any]:
    """What has a key in a typed node, section by section."""
    known = {}
    for key in values.keys() & set(map(str, node)):
        inner = node[key]
        is_section = isinstance(inner, DictConfig) and OmegaConf.get_type(inner) is not dict
        known[key] = _known(values[key], inner) if is_section else values[key]
    return known


def write_config(run_dir: Path, config: JobConfig) -> str | None:
    """Write config.yaml, whole or not at all; returns what stood there before, for `restore_config`."""
    path = run_dir / CONFIG_NAME
    previous = path.read_text(encoding="utf-8") if path.exists() else None
    _replace(path, to_yaml(config))
    return previous


def restore_config(run_dir: Path, previous: str | None, directory: str | None = None) -> None:
    """Undo `write_config` after a job that the user's mistake stopped, so that the next attempt meets no trace of it.

    A run that has saved a checkpoint keeps a config.yaml: without it the checkpoint could not be continued. Not for a
    job that has saved one itself: what it was written with stays.

    Args:
        directory: the run's `checkpoint.dir`.
    """
    if previous is not None:
        _replace(run_dir / CONFIG_NAME, previous)
    elif not has_checkpoint(run_dir, directory):
        (run_dir / CONFIG_NAME).unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest step first."""
    found = [path.parent for path in run_dir.glob(f"checkpoints/step_*/{MANIFEST}")]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # step_9 before step_10


def has_checkpoint(run_dir: Path, directory: str | None = None) -> bool:
    """Whether the run can be resumed; `directory` is its `checkpoint.dir`."""
    return bool(saved_checkpoints(run_dir, directory))


def saved_checkpoints(run_dir: Path, directory: str | None = None) -> list[Folder]:
    """Folders that were published as checkpoints of a run, valid or not by now, oldest step first.

    Args:
        directory: the run's `checkpoint.dir`.
    """
    steps = step_folders(checkpoints_of(run_dir, directory))
    return [folder for folder in steps.values() if MANIFEST in folder.sizes()]


def latest_run(runs: Path = RUNS) -> Path:
    """The run that `resume=latest` means: of the runs in `runs`, the one whose newest valid checkpoint was published
    last, whatever its step and whenever the run began.

    Raises:
        ConfigError: none of them holds a valid checkpoint; says which were passed over, and why.
    """
    times: dict[Path, float] = {}
    passed_over = []
    for path in sorted(runs.glob(f"*/{CONFIG_NAME}")):
        try:
            valid, skipped = valid_checkpoints(checkpoints_of(path.parent, read_config(path.parent).checkpoint.dir))
        except (UserError, OSError) as error:
            passed_over.append(str(error).splitlines()[0])
            continue
        passed_over += [] if valid else [str(folder) for folder in skipped]
        if valid:
            times[path.parent] = valid[max(valid)].saved_at_s
    if not times:
        told = "".join(f"\n          {line}" for line in passed_over)
        rule = f"no run in {runs.absolute()} has saved a checkpoint that is valid{told}"
        raise ConfigError("resume", "latest", rule, "resume=RUN, a run folder that lies elsewhere, or leave resume out")
    return max(times, key=lambda run: (times[run], run.name)).absolute()


def default_run_dir(name: str, suffix: str) -> Path:
    """runs/<name>-<suffix>; the name must be usable in a file name.

    Raises:
        ConfigError: a name that is empty or holds a path separator.
    """
    if not name or name.startswith(".") or re.search(r"[/\\\0\n]", name):
        raise ConfigError(
            "name", name, "it starts the run folder's name, so it holds no / and no leading dot", "name=run"
        )
    return RUNS / f"{name}-{re.sub(r'[^A-Za-z0-9._-]', '_', suffix)}"


def make_run_folder(config: JobConfig, *, resuming: bool = False) -> Path:
    """Make the folder of a run and return its absolute path: `config.run_dir`, or runs/<name>-<YYYYmmdd-HHMMSS>[-n].

    Args:
        config: the validated job.
        resuming: the folder may already hold a run.

    Raises:
        ConfigError: the folder holds a run and this is a new one, or it cannot be made or written.
    """
    if config.run_dir is None:
        stem = default_run_dir(config.name, time.strftime("%Y%m%d-%H%M%S"))
        names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in count(1))
        return next(path.absolute() for path in names if _made(path, exist_ok=False))
    run_dir = Path(config.run_dir).expanduser().absolute()
    if not resuming and ((run_dir / CONFIG_NAME).exists() or (run_dir / "checkpoints").exists()):
        remedy = f"continue it with resume={config.run_dir} or resume=auto, or name another run_dir"
        raise ConfigError("run_dir", config.run_dir, "a new run needs a folder that holds no run", remedy)
    _made(run_dir, exist_ok=True)
    return run_dir


def _made(path: Path, exist_ok: bool) -> bool:
    """Make a folder; False when it exists already and must not."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            return False
        reason = f"the folder cannot be made: {error.strerror}"
        raise ConfigError("run_dir", str(path), reason, "run_dir=a folder that you may write") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError("run_dir", str(path), "the folder cannot be written", "change its permissions, or run_dir")
    return True
