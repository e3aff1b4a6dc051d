"""`octofold launch launch=slurm --multirun`: all jobs of a sweep, as one array of Slurm."""

import time
from collections.abc import Sequence
from dataclasses import replace

from octofold.backends.errors import ConfigError
from octofold.launch import slurm
from octofold.launch.compose import expand
from octofold.launch.environment import foreseen
from octofold.launch.job import draft
from octofold.launch.run_folder import default_run_dir
from octofold.launch.submit import with_run_dir


def run_sweep(texts: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Prove every job, and submit them together; returns the exit status.

    Args:
        texts: overrides, some with several values.
        config_dirs: absolute.

    Raises:
        UserError: a job that cannot be proved, or jobs that are no array.
    """
    drafted = [(job, draft(job, config_dirs)) for job in expand(texts, config_dirs)]
    name, launchers = drafted[0][1].name, {config.launch.name for _, config in drafted}
    if launchers != {"slurm"}:
        rule = "the jobs of a sweep are one array, which Slurm alone has"
        raise ConfigError("launch.name", ", ".join(sorted(launchers)), rule, "launch=slurm, or one job after the other")
    folder = default_run_dir(name, time.strftime("%Y%m%d-%H%M%S")).absolute()
    jobs = [with_run_dir(job, config_dirs, folder / str(number)) for number, (job, _) in enumerate(drafted)]
    run_dirs = [str(config.run_dir) for config, _ in jobs]
    if len(set(run_dirs)) < len(run_dirs):
        raise ConfigError("run_dir", run_dirs[0], "each job of a sweep has a folder of its own", "leave run_dir out")
    submission = slurm.prepare_sweep(folder, jobs, config_dirs)
    if jobs[0][0].launch.dry_run:
        print(replace(submission, settings=foreseen(jobs[0][0])).shown(folder / "launch"), end="", flush=True)
        slurm.check(submission)
        return 0
    slurm.check(submission)
    submission.write(folder / "launch")
    return slurm.submit(submission, jobs[0][0])
