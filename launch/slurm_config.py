"""What the user may say about a Slurm job. Torch-free."""

import re
from dataclasses import dataclass, field

from octofold.backends.errors import ConfigError, unknown_name_error

CONTAINER_ENGINES = ["none", "pyxis", "apptainer"]
LONGEST_LEAD_S = 65535
"""What sbatch --signal takes."""
EARLIEST_S = 60
"""So much earlier than asked for Slurm may send the signal."""
UNLIMITED = ("UNLIMITED", "INFINITE")
OWN_OPTIONS = {
    "array": "--multirun",
    "chdir": "the folder that you launch from",
    "cpus-per-task": "launch.slurm.cpus_per_node",
    "error": "launch/ in run_dir holds what the job prints",
    "exclusive": "launch.slurm.exclusive",
    "gpus-per-node": "launch.slurm.gpus_per_node",
    "gres": "launch.slurm.gres",
    "job-name": "name",
    "mem": "launch.slurm.memory",
    "no-requeue": "launch.slurm.requeue",
    "nodes": "launch.nodes",
    "ntasks": "launch.nodes",
    "ntasks-per-node": "one agent runs on each node",
    "open-mode": "a requeued job appends",
    "output": "launch/ in run_dir holds what the job prints",
    "requeue": "launch.slurm.requeue",
    "signal": "launch.slurm.signal_lead_s",
    "wrap": "the script is Octofold's",
}
"""Options of sbatch that the script sets by itself, and what decides them."""
OWN_SRUN_OPTIONS = {"nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit", "wait"}


@dataclass(frozen=True)
class SlurmContainerConfig:
    """The keys `launch.slurm.container.*`."""

    engine: str = "none"
    """none: this Python, which every node must see under the same path. pyxis: srun --container-image. apptainer:
    apptainer exec. In a container `octofold` is the image's."""
    image: str | None = None
    """As the engine takes it: /shared/octofold.sqsh, docker://registry/octofold@sha256:..., /shared/octofold.sif."""
    mounts: list[str] = field(default_factory=list)
    """FOLDER or FROM:TO or FROM:TO:FLAGS. The working directory and run_dir are mounted without being named."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options, such as {container-writable:""} of srun, or {env:A=1} of apptainer exec; "": without a value."""


@dataclass(frozen=True)
class SlurmConfig:
    """The keys `launch.slurm.*`; null leaves a choice to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one start, as sbatch takes it: minutes, H:MM:SS or D-HH:MM:SS. A requeued job has it anew."""
    gpus_per_node: int | None = None
    """null: launch.nproc_per_node with backend=cuda and without gres, else none are asked for."""
    gres: str | None = None
    """Devices of a node that the cluster knows by other names, such as npu:8 or gpu:h100:8."""
    cpus_per_node: int | None = None
    """null: all of them in an exclusive job, else one."""
    memory: str | None = None
    """Of a node, such as 500G; null: all of it in an exclusive job, else the cluster's default."""
    exclusive: bool = True
    """Nodes are shared with no other job."""
    constraint: str | None = None
    """Features of nodes, such as "a100&nvlink"."""
    nodelist: str | None = None
    exclude: str | None = None
    signal_lead_s: int = 120
    """Ranks are told to save so many seconds before the time limit. Slurm may do it up to 60 s earlier."""
    requeue: bool = True
    """A job that reached its time limit, was preempted or lost a node waits in the queue again, and goes on from its
    newest checkpoint."""
    array_parallelism: int = 0
    """Jobs of a sweep that may run at the same time; 0: all."""
    setup: str | None = None
    """A shell file, sourced on the first node before the agents start: module load, source activate."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch: {mail-type:END,mail-user:me@example.org}; "" is an option without a value."""
    srun_options: dict[str, str] = field(default_factory=dict)
    """The same of srun."""
    container: SlurmContainerConfig = field(default_factory=SlurmContainerConfig)


def check_slurm(slurm: SlurmConfig, stop_deadline_s: float) -> None:
    """Raise `ConfigError` for what no cluster can honour, or no #SBATCH line can carry."""
    _check_texts(slurm)
    _check_numbers(slurm)
    _check_time(slurm)
    if not stop_deadline_s < slurm.signal_lead_s <= LONGEST_LEAD_S:
        shown = f"launch.slurm.signal_lead_s={slurm.signal_lead_s} launch.stop_deadline_s={stop_deadline_s:g}"
        rule = f"ranks have launch.stop_deadline_s to save before the time limit; at most {LONGEST_LEAD_S} s"
        raise ConfigError("launch.slurm.signal_lead_s", shown, rule, f"{int(stop_deadline_s) + 60}")
    if slurm.gres and slurm.gpus_per_node:
        shown = f"launch.slurm.gres={slurm.gres} launch.slurm.gpus_per_node={slurm.gpus_per_node}"
        raise ConfigError("launch.slurm.gres", shown, "the same devices are asked for once", "one of them")
    _check_options("launch.slurm.options", slurm.options, OWN_OPTIONS)
    _check_options("launch.slurm.srun_options", slurm.srun_options, dict.fromkeys(OWN_SRUN_OPTIONS, "launch.nodes"))
    _check_container(slurm.container)


def _check_time(slurm: SlurmConfig) -> None:
    if slurm.time is None or slurm.time in UNLIMITED:
        return
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", slurm.time)
    if not found:
        raise ConfigError("launch.slurm.time", slurm.time, "minutes, H:MM:SS or D-HH:MM:SS", "1-00:00:00")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        first_s = 3600
    else:
        first_s = 3600 if len(numbers) == 3 else 60
    limit_s = int(days or 0) * 86400 + sum(n * first_s // 60**k for k, n in enumerate(numbers))
    if limit_s <= slurm.signal_lead_s + EARLIEST_S:
        shown = f"launch.slurm.time={slurm.time} launch.slurm.signal_lead_s={slurm.signal_lead_s}"
        rule = f"the warning may come {EARLIEST_S} s earlier than asked for; then nothing is left to train in"
        raise ConfigError("launch.slurm.time", shown, rule, "a longer limit, or a shorter lead")


def _check_texts(slurm: SlurmConfig) -> None:
    keys = ("partition", "account", "qos", "gres", "memory", "constraint", "nodelist", "exclude")
    for key in keys:
        value = getattr(slurm, key)
        if value is not None:
            check_text(f"launch.slurm.{key}", value)
            if not value:
                raise ConfigError(f"launch.slurm.{key}", "''", "a text, or null", f"launch.slurm.{key}=null")


def check_text(key: str, value: str) -> None:
    """Raise `ConfigError` for a text that an #SBATCH line cannot carry: it ends with the line."""
    if re.search(r"[\n\0]", value):
        raise ConfigError(key, repr(value), "Slurm takes no line break here", "a text of one line")


def _check_numbers(slurm: SlurmConfig) -> None:
    for key, least in {"gpus_per_node": 0, "cpus_per_node": 1, "array_parallelism": 0}.items():
        value = getattr(slurm, key)
        if value is not None and value < least:
            raise ConfigError(f"launch.slurm.{key}", value, f"a whole number, at least {least}", f"{least}")


def _check_options(key: str, options: dict[str, str], own: dict[str, str]) -> None:
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ConfigError(key, name, "long names of options, without the dashes", f"{key}={{mail-type:END}}")
        if name in own:
            raise ConfigError(key, name, f"the script sets --{name} by itself", own[name])
        check_text(f"{key}.{name}", value)


def _check_container(container: SlurmContainerConfig) -> None:
    key = "launch.slurm.container"
    if container.engine not in CONTAINER_ENGINES:
        raise unknown_name_error(f"{key}.engine", container.engine, CONTAINER_ENGINES)
    if (container.engine == "none") != (container.image is None):
        shown = f"{key}.engine={container.engine} {key}.image={container.image or 'null'}"
        raise ConfigError(f"{key}.image", shown, "an engine and an image, or neither", f"{key}.engine=pyxis")
    for mount in container.mounts:
        check_mount(f"{key}.mounts", mount)
    _check_options(f"{key}.options", container.options, {})


def check_mount(key: str, mount: str) -> None:
    """Raise `ConfigError` for what container engines would take for several mounts, or for parts of one."""
    parts = mount.split(":")
    if not 1 <= len(parts) <= 3 or not all(parts) or not parts[0].startswith("/") or re.search(r"[,\n\0]", mount):
        rule = "FOLDER, FROM:TO or FROM:TO:FLAGS; absolute, and without a comma or line break"
        raise ConfigError(key, mount, rule, f"{key}=[/data:/data:ro]")
