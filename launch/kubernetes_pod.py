"""The pod of one node: what runs in it, what it asks for, what is mounted. Torch-free.

The operator makes launch.nodes of them from one template. Facts of the kubelet that shape it:

- `$(NAME)` in arguments and variables is replaced, `$$` is `$`: user's texts are escaped (kubernetes_names.py).
- A variable for every service of the namespace (a service `master` gives MASTER_PORT=tcp://…), unless
  enableServiceLinks is false.
- Variables of the pod stand over those that a device plugin asks for.
- SIGTERM comes first; terminationGracePeriodSeconds later comes SIGKILL.
"""

import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from octofold.backends.errors import ConfigError
from octofold.launch.config import JobConfig
from octofold.launch.kubernetes_config import KubernetesConfig
from octofold.launch.kubernetes_names import escaped, secret_reference, toleration

CONTAINER = "pytorch"
"""Kubeflow's operator looks for this name, and for that of the port."""
PORT_NAME = "pytorchjob-port"
GRACE_S = 30
"""Between launch.stop_deadline_s and the kubelet's SIGKILL: the agent kills what did not end, and ends."""
DEVICES = {"cuda": "nvidia.com/gpu", "ascend": "huawei.com/Ascend910", "cpu": None}
RANK_TABLE_FOLDER = "/user/serverid/devindex/config"
"""Where Ascend Operator's users mount the table; the file is hccl.json."""
HOST_DRIVER = ("/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi", "/etc/ascend_install.info")
"""What of a node's Ascend driver a container needs (MindCluster's and CANN's container guides)."""


def template(
    job: JobConfig, command: Sequence[str], variables: Sequence[dict[str, Any]], labels: dict[str, str], name: str
) -> dict[str, Any]:
    """The PodTemplateSpec.

    Args:
        command: arguments of the node's process, as they are to arrive.
        variables: entries of `env`, in their final form.
        labels: of the pod, besides the user's.
        name: of the job.

    Raises:
        ConfigError: the job asks for what no pod can give.
    """
    config = job.launch.kubernetes
    mounts, volumes = _volumes(config, name)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": _image(config),
        "command": [escaped(word) for word in command],
        "env": [*_secrets(config), *variables],
        "ports": [{"name": PORT_NAME, "containerPort": config.port}],
        "resources": _resources(config, device_of(job), job.launch.nproc_per_node),
        "securityContext": _rights(config),
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": _identity(config),
        "automountServiceAccountToken": config.service_account is not None,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(job.launch.stop_deadline_s) + GRACE_S,
    }
    spec |= _placing(config, labels)
    metadata = {"labels": {**config.labels, **labels}, "annotations": dict(config.annotations)}
    return {"metadata": {key: value for key, value in metadata.items() if value}, "spec": spec}


def device_of(job: JobConfig) -> str | None:
    """Resource name of the job's accelerators.

    Raises:
        ConfigError: neither launch.kubernetes.device nor the backend names one.
    """
    if job.launch.kubernetes.device is not None:
        return job.launch.kubernetes.device
    # The software NPU is host memory.
    backend = "cpu" if job.backend.software else job.backend.name
    if backend not in DEVICES:
        rule = "what a pod asks for follows from the backend, which auto would choose only in the pod"
        remedy = f"backend={', '.join(DEVICES)}, or launch.kubernetes.device=nvidia.com/gpu"
        raise ConfigError("backend.name", backend, rule, remedy)
    return DEVICES[backend]


def require_kept(job: JobConfig) -> None:
    """Raise `ConfigError` unless the run's folder outlives its pods: it lies in a volume claim."""
    claims = job.launch.kubernetes.claims
    run_dir = PurePosixPath(str(job.run_dir))
    if not any(run_dir == PurePosixPath(path) or PurePosixPath(path) in run_dir.parents for path in claims.values()):
        mounted = ", ".join(claims.values()) or "none"
        rule = f"the run's folder lies in a volume that all pods share and that outlives them (claims: {mounted})"
        remedy = "'launch.kubernetes.claims={CLAIM: /runs}' run_dir=/runs/NAME"
        raise ConfigError("run_dir", str(run_dir), rule, remedy)


def _image(config: KubernetesConfig) -> str:
    if config.image is None:
        rule = "pods need an image"
        raise ConfigError("launch.kubernetes.image", "null", rule, "launch.kubernetes.image=NAME@sha256:…")
    return config.image


def _secrets(config: KubernetesConfig) -> list[dict[str, Any]]:
    references = {variable: secret_reference(variable, text) for variable, text in config.secrets.items()}
    return [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for variable, (secret, key) in references.items()
    ]


def _resources(config: KubernetesConfig, device: str | None, devices: int) -> dict[str, Any]:
    """Devices are asked for as limits, which Kubernetes takes as requests, too; memory is both."""
    limits: dict[str, str] = {}
    if device:
        limits[device] = str(devices)
    limits |= {resource: str(count) for resource, count in config.rdma.items()}
    requests = dict(limits)
    if config.cpu:
        requests["cpu"] = config.cpu
    if config.memory:
        requests["memory"] = limits["memory"] = config.memory
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _rights(config: KubernetesConfig) -> dict[str, Any]:
    # RDMA registers memory, which it locks.
    capabilities: dict[str, list[str]] = {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if config.rdma else {})}
    return {"allowPrivilegeEscalation": False, "capabilities": capabilities}


def _identity(config: KubernetesConfig) -> dict[str, Any]:
    return {
        # For the pod, not the container: the operator's own init container has an image of root.
        "runAsNonRoot": True,
        "runAsUser": config.user,
        "runAsGroup": config.user,
        "fsGroup": config.user,
        # Else every start walks through all files of the volume.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _volumes(config: KubernetesConfig, job_name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """volumeMounts and volumes. Collectives of one node pass data through /dev/shm, of which a container has 64 MiB."""
    memory: dict[str, Any] = {"medium": "Memory", **({"sizeLimit": config.shm} if config.shm else {})}
    wanted: list[tuple[str, dict[str, Any], bool]] = [("/dev/shm", {"emptyDir": memory}, False)]
    for name, path in config.claims.items():
        wanted.append((path, {"persistentVolumeClaim": {"claimName": name}}, False))
    for name, path in config.config_maps.items():
        wanted.append((path, {"configMap": {"name": name}}, True))
    for there, path in config.host_paths.items():
        wanted.append((path, {"hostPath": {"path": there}}, True))
    if config.host_driver:
        wanted += [(path, {"hostPath": {"path": path}}, True) for path in HOST_DRIVER]
    if config.rank_table:
        wanted.append((RANK_TABLE_FOLDER, {"configMap": {"name": rank_table_name(job_name)}}, True))
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    for number, (path, source, is_fixed) in enumerate(wanted):
        # Numbered: a claim's name may be longer than a volume's.
        name = f"volume-{number}" if number else "shared-memory"
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path, **({"readOnly": True} if is_fixed else {})})
    return mounts, volumes


def rank_table_name(job_name: str) -> str:
    """Of the ConfigMap that Ascend Operator fills for a job."""
    return f"rings-config-{job_name}"


def _placing(config: KubernetesConfig, labels: dict[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    if config.node_selector:
        spec["nodeSelector"] = dict(config.node_selector)
    if config.tolerations:
        spec["tolerations"] = [toleration(taint) for taint in config.tolerations]
    if config.priority_class:
        spec["priorityClassName"] = config.priority_class
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    if config.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    if config.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if config.host_network or config.rank_table:
        # Two pods of one job would take one port of the node; and a table has one entry a server.
        apart = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": "kubernetes.io/hostname"}
        spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    return spec
