"""`octofold train`: its flags, and who trains: this process, ranks it starts, or the rank a launcher made of it."""

import argparse
import os
import shlex
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.changes import EFFECTS
from octofold.launch.config import JobConfig
from octofold.launch.failures import USERS_MISTAKE
from octofold.launch.job import Job, draft, settle
from octofold.launch.local import Ended, Joined, join, note_end, start_ranks
from octofold.launch.restart import after_restart, has_saved, leave_mistake, mark_start, restarts
from octofold.launch.run_folder import config_node, default_run_dir, make_run_folder, restore_config, write_config
from octofold.launch.run_lock import locked
from octofold.launch.software_npu import enter_if_asked
from octofold.train.history import append
from octofold.train.stop import exit_status

RESTART_WAIT_S = 15.0
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set for the ranks of an elastic agent: torchrun's, or ours."""


def run(argv: list[str]) -> int:
    """Do what the arguments of `octofold train` ask; returns the exit status.

    Raises:
        UserError: arguments or a configuration that cannot be honoured.
    """
    options = _parser().parse_intermixed_args(argv)
    if options.info or options.cfg:
        # Piped into head or a pager that closes early, they end silently like other tools.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return _inform(options) if options.info else _show(options)
    drafted = None if options.multirun else draft(options.overrides, options.config_dir)
    if drafted and drafted.launch.name != "local" and TORCHRUN not in os.environ:
        if drafted.launch.name != "torchrun":
            rule = "octofold train runs ranks here, or is the agent of one node; octofold launch submits"
            raise ConfigError("launch.name", drafted.launch.name, rule, f"octofold launch launch={drafted.launch.name}")
        enter_if_asked(drafted.backend)
        from octofold.launch.node import run_node

        return run_node(drafted, options.overrides, options.config_dir)
    joined = join(os.environ)
    if options.multirun and joined:
        rule = "a launcher started this process as one rank of one job"
        raise UserError(f"--multirun\n  rule:   {rule}\n  remedy: start the jobs one by one")
    if options.multirun:
        return _multirun(options)
    if joined:
        job = settle(options.overrides, options.config_dir, joined.world_size, drafted=drafted)
        enter_if_asked(job.config.backend)
        os.environ.update(job.config.launch.environment)
        return _join(job, joined)
    job = settle(options.overrides, options.config_dir, drafted=drafted)
    enter_if_asked(job.config.backend)
    os.environ.update(job.config.launch.environment)
    return _start(job, in_process=job.config.launch.nproc_per_node == 1).status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  rule:   key=value overrides and a few flags\n  remedy: octofold train --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="octofold train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")  # Hydra has it; what is shown here is always resolved.
    infos = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=infos)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    return parser


def _inform(options: argparse.Namespace) -> int:
    from octofold.launch.compose import CONFIG_NAME, compose, hydra_session, search_path

    compose(options.overrides, options.config_dir)
    with hydra_session() as session:
        session.show_info(options.info, CONFIG_NAME, [*options.overrides, *search_path(options.config_dir)])
    return 0


def _show(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from octofold.launch.compose import keys_of, nearest

    node = config_node(draft(options.overrides, options.config_dir))
    known = [*map(str, node), *keys_of(JobConfig)]
    if options.package and options.package not in known:
        near = nearest(options.package, known) or "train"
        raise ConfigError("--package", options.package, "there is no such key", f"--package {near}")
    shown = OmegaConf.select(node, options.package) if options.package else node
    print(OmegaConf.to_yaml(shown).rstrip() if OmegaConf.is_config(shown) else shown)
    return 0


def _multirun(options: argparse.Namespace) -> int:
    """Prove every job of the sweep, then run them one after the other, each in processes of its own."""
    from octofold.launch.compose import expand

    texts = expand(options.overrides, options.config_dir)
    jobs = [settle(overrides, options.config_dir) for overrides in texts]
    for job in jobs:
        enter_if_asked(job.config.backend)
    folders = [job.config.run_dir for job in jobs if job.config.run_dir is not None]
    if len(set(folders)) < len(folders):
        raise ConfigError("run_dir", folders[0], "each job of a sweep has a folder of its own", "leave run_dir out")
    first_failure = 0
    for number, (job, overrides) in enumerate(zip(jobs, texts, strict=True), start=1):
        print(f"octofold: job {number} of {len(jobs)}: {shlex.join(overrides)}", file=sys.stderr)
        ended = _start(job, in_process=False)
        if ended.stopped_by is not None:
            return ended.status
        first_failure = first_failure or ended.status
    return first_failure


def _start(job: Job, in_process: bool) -> Ended:
    """Run a job whose ranks nobody has started yet, or rank 0 of one whose ranks a launcher has started."""
    run_dir = make_run_folder(job.config, resuming=job.reuse_folder)
    # The attempt before this one has been killed, which other machines may learn with a delay.
    with locked(run_dir, wait_s=RESTART_WAIT_S if restarts() else 0.0):
        if not restarts():
            tell_changes(job, run_dir)
        return _run_locked(replace(job.config, run_dir=str(run_dir)), run_dir, in_process)


def _run_locked(config: JobConfig, run_dir: Path, in_process: bool) -> Ended:
    if not restarts():
        mark_start(run_dir, config)
    previous = write_config(run_dir, config)
    try:
        ended = _train_here(config, run_dir) if in_process else start_ranks(config.launch, run_dir)
    except UserError:
        undo(config, run_dir, previous)
        raise
    if ended.status == USERS_MISTAKE:
        undo(config, run_dir, previous)
    else:
        note_end(run_dir, ended)
    return ended


def undo(config: JobConfig, run_dir: Path, previous: str | None) -> None:
    """After a user's mistake: the config.yaml of before, unless a checkpoint was saved with the new one."""
    if not has_saved(run_dir, config):
        restore_config(run_dir, previous, config.checkpoint.dir)


def tell_changes(job: Job, run_dir: Path) -> None:
    """Enter into the run's history what continues it, and print what differs from what was saved."""
    if job.config.resume is None:
        return
    changes = [asdict(change) for change in job.changes]
    facts = {"asked": job.asked, "from": job.config.resume, "changes": changes, "allowed": job.config.resume_allow}
    append(run_dir, "resume", **facts)
    if job.changes:
        listed = "\n".join(f"  {change}  ({EFFECTS[change.effect]})" for change in job.changes)
        print(f"octofold: continuing {run_dir} with other values than it was saved with\n{listed}", file=sys.stderr)


def _join(job: Job, joined: Joined) -> int:
    """Run as one rank of a launcher's job: all must find the same folder, and rank 0 writes its config.yaml."""
    run_dir = job.config.run_dir
    if job.asked == "latest" and joined.world_size > 1:
        rule = "every rank must find the same run, and each would look for itself while others may be saving"
        raise ConfigError("resume", "latest", rule, f"resume={job.config.resume}")
    if run_dir is None:
        if joined.job_id is None:
            rule = "every rank must find the same folder, and the launcher gives the job no id"
            raise ConfigError("run_dir", "null", rule, "run_dir=FOLDER")
        run_dir = str(default_run_dir(job.config.name, joined.job_id))
    folder = Path(run_dir).expanduser().absolute()
    config = replace(job.config, run_dir=str(folder))
    if restarts():
        job = replace(job, config=after_restart(config, folder), reuse_folder=True)
    else:
        job = replace(job, config=config)
    try:
        if joined.rank == 0:
            return _start(job, in_process=True).status
        # Only rank 0 can tell a folder that holds a run from one that it has begun to fill itself.
        return _train_here(job.config, make_run_folder(job.config, resuming=True)).status
    except UserError as error:
        if error.status == USERS_MISTAKE:
            leave_mistake(folder, error)
        raise


def _train_here(config: JobConfig, run_dir: Path) -> Ended:
    from octofold.train.main import train

    outcome = train(config, run_dir, stop_deadline_s=config.launch.stop_deadline_s)
    return Ended(exit_status(outcome.interrupted_by), outcome.interrupted_by)
