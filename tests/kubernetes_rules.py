"""What Kubernetes does to a manifest, for tests: its schemas, `$(VARIABLE)`, and what operators put into pods."""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

CRDS = Path(__file__).parent / "data/crds"
SCHEMAS = {
    ("kubeflow.org/v1", "PyTorchJob"): "pytorchjob.json",
    ("batch.volcano.sh/v1alpha1", "Job"): "volcano_job.json",
}
KUBERNETES_VERSIONS = ("1.28", "1.37")
"""The operators' oldest, and the newest whose schemas are installed."""


def closed(schema: Any) -> Any:
    """The schema without room for fields it does not name: a server drops them in silence, a typo among them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {key: value for key, value in made.items() if key == "pattern"}]}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


def require_valid(document: dict[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` for a document that a server would refuse, or take otherwise than written."""
    name = SCHEMAS.get((document["apiVersion"], document["kind"]))
    if name is None:
        _require_core(document)
        return
    _operators(name).validate(document)
    # Its metadata is the server's own type, which the operator's schema leaves open.
    _require_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    for template in templates(document):
        _require_core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template})


def _require_core(document: dict[str, Any]) -> None:
    for version in KUBERNETES_VERSIONS:
        _core(document["kind"].lower(), version).validate(document)


@cache
def _operators(name: str) -> Draft202012Validator:
    schema = closed(json.loads((CRDS / name).read_text(encoding="utf-8")))
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


@cache
def _core(kind: str, version: str) -> Draft202012Validator:
    folder = files(kubernetes_validate) / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    schema = json.loads((folder / f"{kind}-v1.json").read_text(encoding="utf-8"))
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    known: Registry = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return Draft202012Validator(schema, registry=known)


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a job, the first pod's first."""
    spec = document["spec"]
    if document["kind"] == "PyTorchJob":
        return [spec["pytorchReplicaSpecs"][role]["template"] for role in spec["pytorchReplicaSpecs"]]
    return [task["template"] for task in spec["tasks"]]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """What the kubelet makes of an argument or a variable's value: third_party/forked/golang/expansion/expand.go."""
    made, at = "", 0
    while at < len(text):
        if text[at] != "$" or at + 1 == len(text):
            made += text[at]
            at += 1
        elif text[at + 1] == "$":
            made += "$"
            at += 2
        elif text[at + 1] == "(" and ")" in text[at + 2 :]:
            end = text.index(")", at + 2)
            name = text[at + 2 : end]
            made += variables.get(name, f"$({name})")
            at = end + 1
        elif text[at + 1] == "(":
            made += "$("
            at += 2
        else:
            made += text[at : at + 2]
            at += 2
    return made


def process(
    document: dict[str, Any], index: int, given: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment) of the process in pod `index` of a job.

    Args:
        given: what the cluster knows and the manifest only refers to: fields of the pod, values of secrets.
    """
    pods = templates(document)
    pod = pods[min(index, len(pods) - 1)]["spec"]["containers"][0]
    variables: dict[str, str] = {}
    for entry in pod["env"]:
        if "value" in entry:
            variables[entry["name"]] = expanded(entry["value"], variables)
        else:
            (source,) = entry["valueFrom"].values()
            variables[entry["name"]] = (given or {})[source.get("fieldPath") or f"{source['name']}/{source['key']}"]
    variables |= _injected(document, index, pod)
    return [expanded(word, variables) for word in pod["command"]], variables


def _injected(document: dict[str, Any], index: int, pod: dict[str, Any]) -> dict[str, str]:
    name, spec = document["metadata"]["name"], document["spec"]
    if document["kind"] != "PyTorchJob":
        return {"VC_TASK_INDEX": str(index), "VK_TASK_INDEX": str(index)}
    (port,) = [port["containerPort"] for port in pod["ports"] if port["name"] == "pytorchjob-port"]
    pods = str(sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values()))
    address = {"MASTER_ADDR": f"{name}-master-0", "MASTER_PORT": str(port)}
    place = {"WORLD_SIZE": pods, "RANK": str(index), "PET_NODE_RANK": str(index), "PET_NNODES": pods}
    repeated = {f"PET_{key}": value for key, value in address.items()}
    return {"PYTHONUNBUFFERED": "1", **address, **repeated, **place, "PET_NPROC_PER_NODE": "auto"}


def is_dns_label(text: str) -> bool:
    """Whether it can name a service, by DNS-1035."""
    return len(text) <= 63 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text) is not None
