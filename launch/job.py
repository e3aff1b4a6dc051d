"""What `octofold train` is to run: a new job, or one that continues a saved run. Nothing is started or written here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from octofold.backends.errors import ConfigError
from octofold.launch.changes import Change, check_names, differences, require_allowed
from octofold.launch.compose import apply, compose, parse
from octofold.launch.config import JobConfig, LaunchConfig
from octofold.launch.config import check as check_launch
from octofold.launch.members import fitted
from octofold.launch.place import listening_ports
from octofold.launch.run_folder import CONFIG_NAME, latest_run, read_config, saved_checkpoints, with_saved_values
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.validity import candidates
from octofold.train.config import validate
from octofold.train.models.config import ModelConfig

ASKED_EACH_TIME = ("resume", "resume_allow", "run_dir")
"""Keys that belong to a start, not to the run."""
FIRST = "step_0"
"""The checkpoint of a run that has made no step: imported weights."""


@dataclass(frozen=True)
class Job:
    """A job after every rule that needs neither torch nor a device."""

    config: JobConfig
    """`resume` is None for a run that begins at step 0, else the absolute path of the run or checkpoint to continue."""
    reuse_folder: bool
    """Whether the run's folder may hold a run already."""
    asked: str | None = None
    """What the user gave as `resume`: auto, latest, or a path."""
    changes: tuple[Change, ...] = ()
    """What differs from the saved run that is continued."""


def draft(texts: Sequence[str], config_dirs: Sequence[str] = ()) -> JobConfig:
    """The job as the overrides describe it, typed, before any rule that binds several keys.

    With `resume=RUN` or `resume=latest` that is the saved job with the overrides on top, otherwise what `compose` makes
    of them.

    Args:
        texts: overrides in Hydra's grammar.
        config_dirs: folders with further options of the groups.

    Raises:
        UserError: an override that cannot be honoured, or a run that cannot be continued.
    """
    asked = _asked(texts)
    if asked not in (None, "auto", "???"):
        return _continued(str(asked), texts, config_dirs)
    config = compose(texts, config_dirs)
    if config.resume not in (None, "auto"):
        raise ConfigError("resume", config.resume, "a run is named on the command line", f"resume={config.resume}")
    return config


def settle(
    texts: Sequence[str],
    config_dirs: Sequence[str] = (),
    world_size: int | None = None,
    model: ModelConfig | None = None,
    drafted: JobConfig | None = None,
) -> Job:
    """The job to run, proved.

    Args:
        texts: overrides in Hydra's grammar.
        config_dirs: folders with further options of the groups.
        world_size: ranks that a launcher has started; None: those of the `launch` group will be.
        model: replaces the composed one.
        drafted: what `draft` made of the same texts.

    Raises:
        UserError: see `draft`; besides, a rule that binds several keys.
    """
    config = _absolute(drafted or draft(texts, config_dirs))
    config = config if model is None else replace(config, model=model)
    check_launch(config.launch)
    listening_ports(config.launch, config.backend.name)
    check_names(config.resume_allow)
    if world_size is None:
        checked = fitted(config, config.launch.nodes)
    else:
        joined = validate(config, world_size)
        assert isinstance(joined, JobConfig)
        checked = joined
    if checked.resume == "auto":
        checked = _automatic(checked)
        return Job(checked, reuse_folder=True, asked="auto", changes=_allowed_changes(checked))
    return Job(checked, checked.resume is not None, _asked(texts), _allowed_changes(checked))


def _asked(texts: Sequence[str]) -> str | None:
    """What the overrides give as `resume`."""
    given = [override.value() for override in parse(texts) if override.key_or_group == "resume"]
    return None if not given or given[-1] is None else str(given[-1])


def _absolute(config: JobConfig) -> JobConfig:
    """Paths of data and checkpoints made absolute, so that a run can be continued from any working directory."""

    def full(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    data = replace(config.data, cache_dir=full(config.data.cache_dir))
    # A hub dataset's name stays as it is unless it is a folder here.
    if data.path and (data.source != "hub" or Path(data.path).expanduser().exists()):
        data = replace(data, path=full(data.path))
    if Path(data.tokenizer).expanduser().exists() and data.tokenizer not in ("bytes", "bpe"):
        data = replace(data, tokenizer=str(full(data.tokenizer)))
    directory = config.checkpoint.dir
    checkpoint = replace(config.checkpoint, dir=full(directory) if directory and "://" not in directory else directory)
    return replace(config, data=data, checkpoint=checkpoint)


def _continued(asked: str, texts: Sequence[str], config_dirs: Sequence[str]) -> JobConfig:
    """The saved job of a named run or checkpoint, with the user's values on top.

    Where it runs belongs to the start: of several nodes only the ranks of each are kept, or what `launch=` names.
    """
    path = latest_run() if asked == "latest" else Path(asked).expanduser().absolute()
    is_checkpoint = path.parent.name == "checkpoints"
    run_dir = path.parent.parent if is_checkpoint else path
    saved = read_config(run_dir)
    place, found = _place(run_dir, [saved.checkpoint.dir])
    if not found:
        rule, remedy = "the run has saved no checkpoint", f"start it over with run_dir={run_dir} resume=auto"
        raise ConfigError("resume", asked, rule, remedy)
    named = next((checkpoint for checkpoint in found if checkpoint.name == path.name), None)
    if is_checkpoint and named is None:
        names = ", ".join(checkpoint.name for checkpoint in found)
        remedy = f"resume={run_dir}/checkpoints/{found[-1].name}"
        raise ConfigError("resume", asked, f"the run's checkpoints are: {names}", remedy)
    # The saved degree was inferred from the ranks of that day; the ranks of today may be others.
    overrides = list(zip(texts, parse(texts), strict=True))
    chosen = [text for text, override in overrides if override.key_or_group == "launch"]
    launch = compose(chosen, config_dirs).launch if chosen else _without_nodes(saved.launch)
    saved = replace(saved, parallel=replace(saved.parallel, data_shard=-1), resume_allow=[], launch=launch)
    config = apply(saved, [override for _, override in overrides if override.key_or_group not in ("resume", "launch")])
    if config.run_dir != saved.run_dir and Path(str(config.run_dir)).expanduser().absolute() != run_dir:
        shown = f"resume={asked} run_dir={config.run_dir}"
        raise ConfigError("run_dir", shown, "a continued run stays in its folder", "leave run_dir out")
    return replace(config, run_dir=str(run_dir), resume=str(named) if is_checkpoint else place)


def _without_nodes(launch: LaunchConfig) -> LaunchConfig:
    return LaunchConfig(
        nproc_per_node=launch.nproc_per_node,
        stop_deadline_s=launch.stop_deadline_s,
        max_restarts=launch.max_restarts,
        environment=launch.environment,
    )


def _automatic(config: JobConfig) -> JobConfig:
    """The job of `resume=auto`: go on in run_dir where it holds a checkpoint, else begin there."""
    if config.run_dir is None:
        rule = "resume=auto looks for a checkpoint in run_dir, and run_dir=null makes a new folder each time"
        raise ConfigError("resume", "auto", rule, "add run_dir=FOLDER")
    run_dir = Path(config.run_dir).expanduser().absolute()
    # What is configured now comes second: it may be a place that this run has never saved to.
    before = [read_config(run_dir).checkpoint.dir] if (run_dir / CONFIG_NAME).is_file() else []
    place, found = _place(run_dir, [*before, config.checkpoint.dir])
    return replace(config, resume=place if found else None)


def _place(run_dir: Path, directories: Sequence[str | None]) -> tuple[str, list[Folder]]:
    """The first place that holds checkpoints of a run, and its checkpoints, oldest first; the run's folder comes last.

    A start that changed `checkpoint.dir` and saved nothing leaves them where they were.

    Args:
        directories: values of `checkpoint.dir`.
    """
    for directory in directories:
        if found := saved_checkpoints(run_dir, directory):
            return directory or str(run_dir), found
    return str(run_dir), saved_checkpoints(run_dir)


def _allowed_changes(config: JobConfig) -> tuple[Change, ...]:
    """What differs from the values that the checkpoint was saved with, which `config.resume` continues.

    Format 1 of the manifest does not tell; then from the run's config.yaml.

    Raises:
        UserError: something that may not.
    """
    if config.resume is None:
        return ()
    run_dir = Path(str(config.run_dir)).expanduser().absolute()
    before = read_config(run_dir)
    found, _ = candidates(config.resume)
    # An earlier start may have changed config.yaml and saved nothing, and an older checkpoint has values of its own.
    made_with = found[0][1].made_by.get("config") if found else None
    saved = with_saved_values(before, made_with) if made_with else before
    changes = [change for change in differences(saved, config) if change.key not in ASKED_EACH_TIME]
    _, published = _place(run_dir, [before.checkpoint.dir, config.checkpoint.dir])
    begun = any(checkpoint.name != FIRST for checkpoint in published)
    require_allowed(changes, config.resume_allow, str(run_dir), begun=begun)
    return tuple(changes)
