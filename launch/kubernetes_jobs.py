"""The jobs that operators take, around one template of a pod: Kubeflow's PyTorchJob, Volcano's Job. Torch-free.

What they put into the pods, and what follows for `octofold train` there:

PyTorchJob (training-operator 1.9.3, pkg/controller.v1/pytorch)
    MASTER_ADDR = NAME-master-0 (a headless service), MASTER_PORT = the port called pytorchjob-port, the same as
    PET_MASTER_ADDR and PET_MASTER_PORT; RANK = PET_NODE_RANK = 0 for the master, 1 + index for workers; PET_NNODES =
    pods; WORLD_SIZE = pods, times nprocPerNode where that is a number: it is left at "auto", which comes as
    PET_NPROC_PER_NODE=auto. All come after the template's variables, so they win. Workers first run
    `nslookup NAME-master-0` in an init container.
    The job succeeds when the master's pod does: a pod that was stopped before the run's end must not end with 0.
    backoffLimit counts restarts of containers, summed over running pods (pkg/core/job.go). So the policy is OnFailure:
    under ExitCode, which would tell a user's mistake (1 to 127: the job fails) from what may be tried again (128 to
    255), the operator deletes the pod and makes another, whose count begins at 0, and its own count of retries is that
    of a queue which always says 0: what always fails is tried for ever (kubeflow/trainer issue 2045, closed as meant).

Volcano's Job (1.15.1, pkg/controllers/job)
    Pods are NAME-TASK-INDEX, found as NAME-TASK-INDEX.NAME through the plugin svc, which also gives VC_TASK_HOSTS and
    VC_TASK_NUM. Labels volcano.sh/task-index and volcano.sh/job-name since 1.9. MASTER_ADDR, MASTER_PORT, WORLD_SIZE
    (pods) and RANK (pod) are set here from them rather than by the plugin pytorch: with one task, Ascend's scheduler,
    which numbers pods by their index in a task, numbers them likewise. Policies are read in order.

Ascend Operator (MindCluster 26)
    fills the key hccl.json of a ConfigMap rings-config-NAME that is there before the job and has the job's label
    ring-controller.atlas; until then it says {"status": "initializing"}. The kubelet passes the change on within a
    minute or two. MindCluster's scheduler writes the devices of a pod into an annotation named like the resource, from
    which ASCEND_VISIBLE_DEVICES is made for Ascend Docker Runtime.
"""

import json
from typing import Any

from octofold.launch.config import JobConfig
from octofold.launch.kubernetes_pod import rank_table_name
from octofold.launch.members import least_nodes

VOLCANO_TASK = "node"
USERS_MISTAKE = 2
"""Exit status of `octofold train` that no restart mends."""


def pytorch_job(job: JobConfig, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Kubeflow's job: a master, and launch.nodes - 1 workers alike."""
    config = job.launch.kubernetes
    # In place, so that a node that lives keeps its pod, and failures are counted (above); evicted pods are made anew
    # under this policy, too.
    replica = {"restartPolicy": "OnFailure", "template": pod}
    replicas = {"Master": {"replicas": 1, **replica}}
    if job.launch.nodes > 1:
        replicas["Worker"] = {"replicas": job.launch.nodes - 1, **replica}
    scheduling: dict[str, Any] = {"minAvailable": least_nodes(job.launch)}
    if config.queue:
        scheduling["queue"] = config.queue
    if config.priority_class:
        scheduling["priorityClass"] = config.priority_class
    policy: dict[str, Any] = {
        # A failed job gives its devices back; pods that have ended stay, with their logs.
        "cleanPodPolicy": "Running",
        "backoffLimit": config.max_restarts * job.launch.nodes,
        "schedulingPolicy": scheduling,
    }
    if config.ttl_s is not None:
        policy["ttlSecondsAfterFinished"] = config.ttl_s
    if config.deadline_s is not None:
        policy["activeDeadlineSeconds"] = config.deadline_s
    if config.scheduler:
        pod["spec"]["schedulerName"] = config.scheduler
    spec = {"runPolicy": policy, "pytorchReplicaSpecs": replicas}
    return _document("kubeflow.org/v1", "PyTorchJob", job, name, {}, spec)


def volcano_job(job: JobConfig, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Volcano's job: one task of launch.nodes pods, placed together or not at all."""
    config = job.launch.kubernetes
    pod["spec"]["restartPolicy"] = "Never"
    spec: dict[str, Any] = {
        "minAvailable": least_nodes(job.launch),
        "maxRetry": config.max_restarts,
        "schedulerName": config.scheduler or "volcano",
        "plugins": {"env": [], "svc": []},
        "policies": [
            {"exitCode": USERS_MISTAKE, "action": "TerminateJob"},
            {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        ],
        "tasks": [{"name": VOLCANO_TASK, "replicas": job.launch.nodes, "template": pod}],
    }
    if config.queue:
        spec["queue"] = config.queue
    if config.priority_class:
        spec["priorityClassName"] = config.priority_class
    if config.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = config.ttl_s
    return _document("batch.volcano.sh/v1alpha1", "Job", job, name, ring_labels(job), spec)


def rank_table_map(job: JobConfig, name: str) -> dict[str, Any]:
    """The ConfigMap that Ascend Operator fills."""
    data = {"hccl.json": json.dumps({"status": "initializing"})}
    metadata = _metadata(job, rank_table_name(name), ring_labels(job), {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def ring_labels(job: JobConfig) -> dict[str, str]:
    """What MindCluster knows its jobs by."""
    ring = job.launch.kubernetes.ring_controller
    return {} if ring is None else {"ring-controller.atlas": ring}


def volcano_variables(job: JobConfig, name: str) -> list[dict[str, Any]]:
    """The pod's place in the job, under the names that Kubeflow's operator uses."""
    index = {"fieldRef": {"fieldPath": "metadata.labels['volcano.sh/task-index']"}}
    return [
        {"name": "MASTER_ADDR", "value": f"{name}-{VOLCANO_TASK}-0.{name}"},
        {"name": "MASTER_PORT", "value": str(job.launch.kubernetes.port)},
        {"name": "WORLD_SIZE", "value": str(job.launch.nodes)},
        {"name": "RANK", "valueFrom": index},
    ]


def _document(
    version: str, kind: str, job: JobConfig, name: str, labels: dict[str, str], spec: dict[str, Any]
) -> dict[str, Any]:
    annotations = job.launch.kubernetes.annotations
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": _metadata(job, name, labels, annotations),
        "spec": spec,
    }


def _metadata(job: JobConfig, name: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if job.launch.kubernetes.namespace:
        metadata["namespace"] = job.launch.kubernetes.namespace
    metadata["labels"] = {**job.launch.kubernetes.labels, **labels, "app.kubernetes.io/name": "octofold"}
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata
