"""`octofold launch`: proves a job, says what its engine is to run, and has it run. It schedules nothing itself."""

import argparse
import importlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, Protocol, cast

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import literal_override, parse
from octofold.launch.config import ENGINES, JobConfig
from octofold.launch.environment import foreseen
from octofold.launch.job import draft, settle
from octofold.launch.run_folder import default_run_dir
from octofold.launch.submission import Submission


class Engine(Protocol):
    """A module of `ENGINES`."""

    def prepare(self, config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> Submission:
        """What is to be run for a proved job.

        Args:
            config: settled; `run_dir` is absolute.
            overrides: the user's, and run_dir. Each is one argument, in Hydra's grammar.
            config_dirs: absolute.

        Raises:
            UserError: the engine cannot take the job.
        """

    def check(self, submission: Submission) -> None:
        """Check what was prepared with the engine's own tools, where they are here.

        Raises:
            UserError: they refuse it.
        """

    def submit(self, submission: Submission, config: JobConfig) -> int:
        """Have it run; returns the exit status. The files lie in `launch_folder(config)`."""


def launch_folder(config: JobConfig) -> Path:
    """Where the files of a submission lie."""
    if config.launch.name == "kubernetes":
        # The run's folder is one of the pods' volumes, which this machine need not have.
        return Path("runs").absolute() / Path(str(config.run_dir)).name / "launch"
    return Path(str(config.run_dir)) / "launch"


def run(argv: list[str]) -> int:
    """Do what the arguments of `octofold launch` ask; returns the exit status.

    Raises:
        UserError: a job that cannot be proved, or that its engine cannot take.
    """
    options = _parser().parse_intermixed_args(argv)
    config_dirs = [str(Path(folder).expanduser().absolute()) for folder in options.config_dir]
    if options.multirun:
        from octofold.launch.sweep import run_sweep

        return run_sweep(options.overrides, config_dirs)
    name = draft(options.overrides, config_dirs).launch.name
    if name not in ENGINES:
        remedy = " or ".join(f"launch={engine}" for engine in ENGINES)
        raise ConfigError("launch.name", name, "octofold launch starts jobs of several machines", remedy)
    engine = cast(Engine, importlib.import_module(ENGINES[name]))
    config, overrides = with_run_dir(options.overrides, config_dirs)
    submission = engine.prepare(config, overrides, config_dirs)
    if config.launch.dry_run:
        # Before the check: who is refused wants to see what was.
        print(replace(submission, settings=foreseen(config)).shown(launch_folder(config)), end="", flush=True)
        engine.check(submission)
        return 0
    engine.check(submission)
    if submission.files:
        submission.write(launch_folder(config))
    return engine.submit(submission, config)


def with_run_dir(
    texts: Sequence[str], config_dirs: Sequence[str], otherwise: Path | None = None
) -> tuple[JobConfig, list[str]]:
    """The proved job, and its overrides with the folder of the run: every node must find the same one.

    Args:
        otherwise: the folder where the overrides name none; None: one with the time in its name.

    Raises:
        UserError: see `settle`.
    """
    config = settle(texts, config_dirs).config
    otherwise = otherwise or default_run_dir(config.name, time.strftime("%Y%m%d-%H%M%S"))
    run_dir = Path(config.run_dir or otherwise)
    run_dir = run_dir.expanduser().absolute()
    overrides = parse(texts)
    fixed = ["run_dir"]
    # The newest run of now, not of when a queue has let the job start.
    if any(override.key_or_group == "resume" and override.value() == "latest" for override in overrides):
        fixed.append("resume")
    kept = [text for text, override in zip(texts, overrides, strict=True) if override.key_or_group not in fixed]
    return replace(config, run_dir=str(run_dir)), [*kept, *(literal_override(key, str(run_dir)) for key in fixed)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  rule:   key=value overrides and a few flags\n  remedy: octofold launch --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="octofold launch", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    return parser
