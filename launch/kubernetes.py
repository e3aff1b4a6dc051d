"""`octofold launch launch=kubernetes`: one manifest, for Kubeflow's training operator or Volcano. Torch-free."""

import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from octofold.backends.errors import ConfigError, UserError
from octofold.backends.rank_table import VARIABLE
from octofold.launch.compose import parse
from octofold.launch.config import JobConfig
from octofold.launch.kubernetes_config import KubernetesConfig
from octofold.launch.kubernetes_jobs import (
    pytorch_job,
    rank_table_map,
    ring_labels,
    volcano_job,
    volcano_variables,
)
from octofold.launch.kubernetes_names import check_text, job_name
from octofold.launch.kubernetes_pod import RANK_TABLE_FOLDER, device_of, require_kept, template
from octofold.launch.members import require_no_table
from octofold.launch.submission import Submission, node_command, run_commands
from octofold.launch.submit import launch_folder

MANIFEST = "kubernetes.yaml"
PLAIN_WORD = r"[A-Za-z][A-Za-z/._-]+"
"""What every version of YAML reads as a text, but for the words below."""
NO_PLAIN_WORDS = {"true", "false", "yes", "no", "on", "off", "null"}


def prepare(config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> Submission:
    """The manifest of a settled job.

    Raises:
        ConfigError: what Kubernetes, or the job's pods, could not honour.
    """
    kubernetes = config.launch.kubernetes
    require_kept(config)
    _require_mounted(config_dirs, kubernetes)
    name = job_name(kubernetes.name, config.name)
    command = _command(config, overrides, config_dirs)
    labels = {"app.kubernetes.io/name": "octofold", "app.kubernetes.io/instance": name, **ring_labels(config)}
    is_volcano = kubernetes.kind == "volcano"
    placed = volcano_variables(config, name) if is_volcano else []
    variables = [*placed, *_from_pod(config)]
    _require_free(kubernetes, [variable["name"] for variable in variables])
    pod = template(config, command, variables, labels, name)
    if kubernetes.rank_table:
        require_no_table({VARIABLE: "launch.kubernetes.rank_table"}, config.launch)
    documents = [rank_table_map(config, name)] if kubernetes.rank_table else []
    documents.append((volcano_job if is_volcano else pytorch_job)(config, name, pod))
    command_here = ("kubectl", "create", "-f", str(launch_folder(config) / MANIFEST))
    return Submission({MANIFEST: manifest(documents)}, (command_here,), notes=_notes(config, name))


def check(submission: Submission) -> None:
    """Have kubectl read the manifest, and the cluster, where it knows one, try it (`--dry-run=server`).

    Raises:
        UserError: they refuse it.
    """
    if shutil.which("kubectl") is None:
        return
    text = submission.files[MANIFEST]
    # kubectl create --dry-run=client asks a server for the kinds; labelling a local file reads it and asks nobody.
    _kubectl(
        ["label", "--local", "--dry-run=client", "-f", "-", "--overwrite", "app.kubernetes.io/name=octofold"], text
    )
    if subprocess.run(["kubectl", "config", "current-context"], capture_output=True, check=False).returncode == 0:
        _kubectl(["create", "--dry-run=server", "-f", "-"], text)


def submit(submission: Submission, config: JobConfig) -> int:
    """Create the job; an existing one of its name is an error of kubectl's."""
    return run_commands(submission.commands)


def manifest(documents: Sequence[dict[str, Any]]) -> str:
    """YAML that every reader takes as it was meant."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1_000_000, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every text but plain words.

    kubectl's YAML takes `1e3`, `0o7` and `y` for numbers and a truth, which PyYAML writes without quotes.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = re.fullmatch(PLAIN_WORD, text) and text.lower() not in NO_PLAIN_WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _text)


def _command(config: JobConfig, overrides: Sequence[str], config_dirs: Sequence[str]) -> list[str]:
    for text in overrides:
        check_text("command", text)
    flags = [text for folder in config_dirs for text in ("--config-dir", folder)]
    # A pod that is started again goes on.
    asked = any(override.key_or_group == "resume" for override in parse(overrides))
    added = [] if asked else ["resume=auto"]
    # An operator takes a pod that ends with 0 for one whose work is done.
    added.append(f"launch.unfinished_status={128 + signal.SIGTERM}")
    return node_command(config.launch.kubernetes.program, overrides, [*flags, *added])


def _from_pod(config: JobConfig) -> list[dict[str, Any]]:
    """What the Ascend stack in the pod needs; interfaces are each node's own to find (launch/environment.py)."""
    kubernetes = config.launch.kubernetes
    if config.backend.name != "ascend" or config.backend.software:
        return []
    variables: list[dict[str, Any]] = []
    if kubernetes.ring_controller:
        annotation = {"fieldRef": {"fieldPath": f"metadata.annotations['{device_of(config)}']"}}
        variables.append({"name": "ASCEND_VISIBLE_DEVICES", "valueFrom": annotation})
    if kubernetes.rank_table:
        variables.append({"name": "RANK_TABLE_FILE", "value": f"{RANK_TABLE_FOLDER}/hccl.json"})
    return variables


def _require_free(config: KubernetesConfig, names: Sequence[str]) -> None:
    for name in names:
        if name in config.secrets:
            rule = "a variable that the launcher sets itself"
            raise ConfigError("launch.kubernetes.secrets", name, rule, "another variable")


def _require_mounted(config_dirs: Sequence[str], config: KubernetesConfig) -> None:
    """Raise `UserError` for a folder of options that pods would not find."""
    mounted = [*config.claims.values(), *config.config_maps.values(), *config.host_paths.values()]
    for folder in config_dirs:
        path = PurePosixPath(folder)
        if not any(path == PurePosixPath(place) or PurePosixPath(place) in path.parents for place in mounted):
            rule = "pods read it, too, so it lies in a volume, under the same path"
            remedy = f"'launch.kubernetes.config_maps={{NAME: {folder}}}', or its values as overrides"
            raise ConfigError("--config-dir", folder, rule, remedy)


def _notes(config: JobConfig, name: str) -> tuple[str, ...]:
    namespace = config.launch.kubernetes.namespace
    where = f" -n {namespace}" if namespace else ""
    is_volcano = config.launch.kubernetes.kind == "volcano"
    first, kind = (f"{name}-node-0", "jobs.batch.volcano.sh") if is_volcano else (f"{name}-master-0", "pytorchjob")
    table = f" configmap/rings-config-{name}" if config.launch.kubernetes.rank_table else ""
    return (
        f"follow it: kubectl logs{where} -f {first}",
        f"end it:    kubectl delete{where} {kind}/{name}{table}",
    )


def _kubectl(arguments: Sequence[str], text: str) -> None:
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip() or done.stdout.strip()
        rule = "kubectl and the cluster take the manifest"
        remedy = "what it says; launch.dry_run=true shows the manifest"
        raise UserError(f"kubectl {arguments[0]}: {told}\n  rule:   {rule}\n  remedy: {remedy}")
