"""What the user may say about a job on Kubernetes, and what of it Kubernetes would refuse. Torch-free."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from octofold.backends.errors import ConfigError, unknown_name_error
from octofold.launch import kubernetes_names as names

KINDS = ["pytorchjob", "volcano"]


@dataclass(frozen=True)
class KubernetesConfig:
    """The keys `launch.kubernetes.*`."""

    kind: str = "pytorchjob"
    """pytorchjob: Kubeflow's training operator (1.6 to 1.9). volcano: Volcano's Job (1.9 or newer)."""
    name: str | None = None
    """Of the job; null: made of `name`."""
    namespace: str | None = None
    """null: that of kubectl's context."""
    image: str | None = None
    """By digest, NAME@sha256:…, so that every start and every node runs the same."""
    allow_tag: bool = False
    """Take an image by its tag, which may be another one at the next start."""
    program: list[str] = field(default_factory=lambda: ["octofold"])
    """The command that is octofold in the image."""
    image_pull_secrets: list[str] = field(default_factory=list)
    """Names of secrets that open the registry."""
    service_account: str | None = None
    """null: the namespace's default, and no token in the pods."""
    user: int = 1000
    """User and group of the processes, and group of volumes. Octofold's images are made for 1000."""
    device: str | None = None
    """Resource of the accelerators; null: nvidia.com/gpu with backend=cuda, huawei.com/Ascend910 with backend=ascend
    (910B and 910C; the 950 is huawei.com/npu), none with backend=cpu. A pod gets launch.nproc_per_node of them."""
    cpu: str | None = None
    """CPUs that a pod asks for, such as 64 or 500m."""
    memory: str | None = None
    """Memory that a pod asks for and is held to, such as 512Gi; what lies in /dev/shm counts."""
    shm: str | None = None
    """Size of /dev/shm; null: as large as the node lets it be."""
    rdma: dict[str, int] = field(default_factory=dict)
    """RDMA devices of a pod, {RESOURCE: COUNT}, such as {rdma/hca: 1}; adds the right to lock memory."""
    host_network: bool = False
    """Pods in the node's own network; one pod a node."""
    port: int = 23456
    """Where the first pod listens for the others."""
    claims: dict[str, str] = field(default_factory=dict)
    """Volume claims, {NAME: PATH}; run_dir lies in one."""
    config_maps: dict[str, str] = field(default_factory=dict)
    """Config maps, {NAME: PATH}, read-only."""
    host_paths: dict[str, str] = field(default_factory=dict)
    """Folders of the node, {PATH_THERE: PATH}, read-only."""
    host_driver: bool = False
    """Mount the node's Ascend driver, where Ascend Docker Runtime does not."""
    ring_controller: str | None = None
    """Value of the label ring-controller.atlas, such as ascend-910b, where MindCluster schedules (kind=volcano)."""
    rank_table: bool = False
    """HCCL by the rank table that Ascend Operator writes; else by root info. Needs ring_controller."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Variables of the pods from secrets, {VARIABLE: SECRET/KEY}; the values never pass through Octofold."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes to run on."""
    tolerations: list[str] = field(default_factory=list)
    """Taints to bear, as kubectl taint writes them: KEY, KEY=VALUE, KEY:EFFECT or KEY=VALUE:EFFECT."""
    priority_class: str | None = None
    """Of the pods."""
    scheduler: str | None = None
    """Name of the scheduler; null: the operator's choice."""
    queue: str | None = None
    """Volcano's queue; with pytorchjob, of its gang scheduler."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods."""
    annotations: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods."""
    max_restarts: int = 10
    """How often the operator starts pods again (those of the agent, launch.max_restarts, come first)."""
    ttl_s: int | None = None
    """Delete the job so long after its end; null: keep it."""
    deadline_s: int | None = None
    """End the job after so long (pytorchjob)."""


def check_kubernetes(config: KubernetesConfig) -> None:
    """Raise `ConfigError` for a value that Kubernetes would refuse, or misunderstand."""
    if config.kind not in KINDS:
        raise unknown_name_error("launch.kubernetes.kind", config.kind, KINDS)
    _check_names(config)
    _check_image(config)
    _check_sizes(config)
    _check_places(config)
    _check_ascend(config)
    for taint in config.tolerations:
        names.toleration(taint)
    for variable, reference in config.secrets.items():
        names.check_variable("secrets", variable)
        names.secret_reference(variable, reference)


def _check_names(config: KubernetesConfig) -> None:
    if config.name is not None:
        names.check_label("name", config.name)
    if config.namespace is not None:
        names.check_label("namespace", config.namespace, longest=63)
    for key in ("service_account", "priority_class", "scheduler", "queue"):
        if getattr(config, key) is not None:
            names.check_subdomain(key, getattr(config, key))
    for key in ("image_pull_secrets", "claims", "config_maps"):
        for name in getattr(config, key):
            names.check_subdomain(key, name)
    for key in ("labels", "node_selector"):
        for name, value in getattr(config, key).items():
            names.check_qualified(key, name)
            names.check_label_value(key, value)
    for name in config.labels:
        names.check_free_label(name)
    for name, value in config.annotations.items():
        names.check_qualified("annotations", name)
        names.check_text("annotations", value)


def _check_image(config: KubernetesConfig) -> None:
    if config.image is not None:
        names.check_image(config.image, config.allow_tag)
    if not config.program:
        raise ConfigError("launch.kubernetes.program", "[]", "a command", "launch.kubernetes.program=[octofold]")
    for word in config.program:
        names.check_text("program", word)


def _check_sizes(config: KubernetesConfig) -> None:
    for key in ("cpu", "memory", "shm"):
        if getattr(config, key) is not None:
            names.check_quantity(key, getattr(config, key))
    for key, least in (("user", 1), ("max_restarts", 1), ("ttl_s", 0), ("deadline_s", 1)):
        value = getattr(config, key)
        if value is not None and not least <= value < 2**31:
            raise ConfigError(f"launch.kubernetes.{key}", value, f"a number, at least {least}", f"{max(least, 1)}")
    if not 1024 <= config.port < 65536:
        rule = "a port that a user may open, 1024 to 65535"
        raise ConfigError("launch.kubernetes.port", config.port, rule, "launch.kubernetes.port=23456")
    for resource, count in config.rdma.items():
        names.check_resource("rdma", resource)
        if count < 1:
            raise ConfigError("launch.kubernetes.rdma", f"{resource}: {count}", "at least one device", f"{resource}: 1")
    if config.device is not None:
        names.check_resource("device", config.device)
    if config.deadline_s is not None and config.kind == "volcano":
        shown = f"launch.kubernetes.deadline_s={config.deadline_s} kind=volcano"
        raise ConfigError("launch.kubernetes.deadline_s", shown, "Volcano's Job has none", "deadline_s=null")


def _check_places(config: KubernetesConfig) -> None:
    taken: dict[str, str] = {"/dev/shm": "shared memory"}
    for key in ("claims", "config_maps", "host_paths"):
        for name, path in getattr(config, key).items():
            names.check_path(key, path)
            if key == "host_paths":
                names.check_path(key, name)
            place = str(PurePosixPath(path))
            if place in taken:
                shown = f"{key} {name} and {taken[place]} at {place}"
                raise ConfigError(f"launch.kubernetes.{key}", shown, "one volume at a path", "another path")
            taken[place] = f"{key} {name}"


def _check_ascend(config: KubernetesConfig) -> None:
    if config.ring_controller is not None:
        names.check_label_value("ring_controller", config.ring_controller)
        if config.kind != "volcano":
            shown = f"launch.kubernetes.ring_controller={config.ring_controller} kind={config.kind}"
            rule = "MindCluster schedules Volcano's jobs"
            raise ConfigError("launch.kubernetes.ring_controller", shown, rule, "launch.kubernetes.kind=volcano")
    if config.rank_table and config.ring_controller is None:
        rule = "Ascend Operator writes tables for jobs with that label"
        raise ConfigError("launch.kubernetes.rank_table", "true", rule, "launch.kubernetes.ring_controller=ascend-910b")
