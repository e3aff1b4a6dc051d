"""`octofold launch launch=slurm`: a batch script that sbatch takes, with srun and one agent on each node.

The script is plain text rather than submitit's: what is printed is all that runs, and `sbatch` takes it again as it is.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import parse
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import CONFIG_NAME
from octofold.launch.slurm_config import SlurmContainerConfig, check_mount, check_text
from octofold.launch.slurm_script import Script, output_pattern, text
from octofold.launch.submission import HERE, Submission, node_command, run_commands

SCRIPT = "job.sh"
TEST_S = 60.0
"""For `sbatch --test-only`; a controller that cannot be reached is tried for a while."""


def prepare(config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> Submission:
    """The batch script of a job.

    Raises:
        ConfigError: a value that Slurm cannot carry, or a job that a requeue would set back.
    """
    return prepare_sweep(Path(str(config.run_dir)), [(config, overrides)], config_dirs)


def prepare_sweep(
    folder: Path, jobs: Sequence[tuple[JobConfig, Sequence[str]]], config_dirs: Sequence[str]
) -> Submission:
    """The batch script of one job, or of a sweep as an array with a task for each job.

    Args:
        folder: the script, and what Slurm's tasks print, lie in `folder`/launch.
        jobs: each with its own run_dir and overrides. What they ask of Slurm is the same.
        config_dirs: absolute.

    Raises:
        ConfigError: see `prepare`; besides, jobs that differ in what they ask for.
    """
    first = jobs[0][0]
    for config, overrides in jobs:
        _check_job(config, overrides)
        _check_same(first, config)
    script = Script(
        directives=_directives(first, folder, len(jobs)),
        srun=_srun(first, [str(config.run_dir) for config, _ in jobs]),
        commands=[_command(config, overrides, config_dirs) for config, overrides in jobs],
        setup=first.launch.slurm.setup,
        requeue=first.launch.slurm.requeue,
    )
    sbatch = "sbatch", str(folder / "launch" / SCRIPT)
    notes = () if shutil.which("sbatch") else ("sbatch is not installed here: the script was checked by bash alone",)
    return Submission({SCRIPT: text(script)}, (sbatch,), notes=notes)


def check(submission: Submission) -> None:
    """Have bash read the script, and Slurm, where it is here, say whether it would take the job.

    Raises:
        UserError: the reason of either.
    """
    script = submission.files[SCRIPT]
    for command in (["bash", "-n"], ["sbatch", "--test-only"]):
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, input=script.encode(), capture_output=True, timeout=TEST_S)
        except subprocess.TimeoutExpired as error:
            rule, remedy = f"Slurm answers within {TEST_S:g} s", "try `sinfo`; the controller may be down"
            raise UserError(f"{' '.join(command)}\n  rule:   {rule}\n  remedy: {remedy}") from error
        if done.returncode:
            reason = " ".join(done.stderr.decode(errors="replace").split())
            remedy = "other values of launch.slurm.*; `sinfo` shows partitions and nodes"
            if "Unable to contact slurm controller" in reason:
                remedy = "try `scontrol ping`: this machine does not reach Slurm's controller"
            raise UserError(f"{' '.join(command)}\n  rule:   the job is accepted; {reason}\n  remedy: {remedy}")


def submit(submission: Submission, config: JobConfig) -> int:
    """Hand the script to sbatch, which prints the job's number."""
    if shutil.which("sbatch") is None:
        rule, remedy = "sbatch hands the job to Slurm, and is not installed here", "run this on a login node"
        raise UserError(f"launch=slurm\n  rule:   {rule}\n  remedy: {remedy}")
    return run_commands(submission.commands)


def _check_job(config: JobConfig, overrides: Sequence[str]) -> None:
    check_text("name", config.name)
    run_dir = str(config.run_dir)
    check_text("run_dir", run_dir)
    if "\\" in run_dir:
        rule = "Slurm takes a backslash in --output for its own, and the job's output goes there"
        raise ConfigError("run_dir", run_dir, rule, "a run_dir without backslashes")
    given = [override.value() for override in parse(overrides) if override.key_or_group == "resume"]
    if not given and ((Path(run_dir) / CONFIG_NAME).exists() or (Path(run_dir) / "checkpoints").exists()):
        remedy = "add resume=auto to go on with it, or name another run_dir"
        raise ConfigError("run_dir", run_dir, "a new run needs a folder that holds no run", remedy)
    if config.launch.slurm.requeue and given and Path(str(given[-1])).parent.name == "checkpoints":
        rule = "a requeued job would go back to that checkpoint"
        raise ConfigError("resume", str(given[-1]), rule, "resume=RUN, or launch.slurm.requeue=false")


def _check_same(first: JobConfig, other: JobConfig) -> None:
    for key in ("nodes", "min_nodes", "nproc_per_node", "stop_deadline_s", "slurm"):
        if getattr(first.launch, key) != getattr(other.launch, key):
            rule = "the jobs of a sweep are one array, whose tasks ask for the same nodes"
            raise ConfigError(f"launch.{key}", "several values", rule, "one value, or sweeps one by one")
    if first.backend.name != other.backend.name and _gpus(first) != _gpus(other):
        rule = "the jobs of a sweep are one array, whose tasks ask for the same devices"
        raise ConfigError("backend.name", "several values", rule, "launch.slurm.gpus_per_node=NUMBER")


def _directives(config: JobConfig, folder: Path, tasks: int) -> dict[str, str | None]:
    launch, slurm = config.launch, config.launch.slurm
    gpus = _gpus(config)
    optional = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "cpus-per-task": slurm.cpus_per_node,
        "gpus-per-node": gpus or None,
        "gres": slurm.gres,
        "mem": slurm.memory or ("0" if slurm.exclusive else None),
        "constraint": slurm.constraint,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
    }
    found: dict[str, str | None] = {"job-name": config.name, "nodes": str(launch.nodes), "ntasks-per-node": "1"}
    found |= {name: str(value) for name, value in optional.items() if value is not None}
    if slurm.exclusive:
        found["exclusive"] = None
    if tasks > 1:
        at_once = f"%{slurm.array_parallelism}" if slurm.array_parallelism else ""
        found["array"] = f"0-{tasks - 1}{at_once}"
    pattern = "slurm_%A_%a.log" if tasks > 1 else "slurm_%j.log"
    found |= {"chdir": _working_directory(), "output": output_pattern(str(folder / "launch"), pattern)}
    # B: the script, not the agents themselves: their status alone does not tell "saved" from "done".
    found |= {"open-mode": "append", "signal": f"B:USR1@{slurm.signal_lead_s}"}
    found["requeue" if slurm.requeue else "no-requeue"] = None
    return found | {name: value or None for name, value in slurm.options.items()}


def _working_directory() -> str:
    directory = os.getcwd()
    check_text("the working directory", directory)
    return directory


def _gpus(config: JobConfig) -> int:
    slurm = config.launch.slurm
    if slurm.gpus_per_node is not None:
        return slurm.gpus_per_node
    return config.launch.nproc_per_node if config.backend.name == "cuda" and not slurm.gres else 0


def _srun(config: JobConfig, run_dirs: Sequence[str]) -> list[str]:
    launch, slurm = config.launch, config.launch.slurm
    options = [f"--nodes={launch.nodes}", f"--ntasks={launch.nodes}", "--ntasks-per-node=1"]
    # Agents learn from each other when one has failed, and tell why; srun, or a cluster's default, would be faster.
    options += ["--kill-on-bad-exit=0", "--wait=0"]
    # srun does not inherit --cpus-per-task, and would bind an agent with all its ranks to one core.
    options += [f"--cpus-per-task={slurm.cpus_per_node}"] if slurm.cpus_per_node else []
    options += ["--cpu-bind=none"]
    container = slurm.container
    if container.engine == "pyxis":
        options += [f"--container-image={container.image}", f"--container-workdir={_working_directory()}"]
        options += [f"--container-mounts={','.join(_mounts(container, run_dirs))}", *_flags(container.options)]
    return options + _flags(slurm.srun_options)


def _command(config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> list[str]:
    container = config.launch.slurm.container
    program = HERE if container.engine == "none" else ("octofold",)
    added = [text for folder in config_dirs for text in ("--config-dir", folder)]
    # A job that Slurm starts again goes on; with resume=RUN it does so already.
    added += [] if any(override.key_or_group == "resume" for override in parse(overrides)) else ["resume=auto"]
    command = node_command(program, overrides, added)
    if container.engine != "apptainer":
        return command
    vendor = ["--nv"] if config.backend.name == "cuda" else []
    binds = ["--bind", ",".join(_mounts(container, [str(config.run_dir)])), "--pwd", _working_directory()]
    return ["apptainer", "exec", *vendor, *binds, *_flags(container.options), str(container.image), *command]


def _mounts(container: SlurmContainerConfig, run_dirs: Sequence[str]) -> list[str]:
    """With the working directory and the folders of runs, under the same names as outside."""
    own = {"the working directory": [_working_directory()], "run_dir": run_dirs}
    for key, folders in own.items():
        for folder in folders:
            check_mount(key, folder)
            if ":" in folder:
                raise ConfigError(key, folder, "a container's mounts know no colon", "a folder without one")
    # pyxis mounts a single path under its own name, too; written out, it is the same for both.
    folders = list(dict.fromkeys(folder for group in own.values() for folder in group))
    return [f"{folder}:{folder}" for folder in folders] + list(container.mounts)


def _flags(options: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
