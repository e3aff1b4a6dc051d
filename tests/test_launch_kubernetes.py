"""Jobs for Kubernetes: valid by the real schemas, read by kubectl as meant, and nothing typed is changed or run."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes_rules import expanded, is_dns_label, process, require_valid, templates

from octofold.backends.errors import ConfigError, UserError
from octofold.launch.compose import compose, literal_override
from octofold.launch.config import JobConfig, check
from octofold.launch.kubernetes import MANIFEST, manifest, prepare
from octofold.launch.kubernetes import check as check_submission
from octofold.launch.kubernetes_config import KubernetesConfig, check_kubernetes
from octofold.launch.kubernetes_names import escaped, job_name

IMAGE = "registry.example:5000/team/octofold@sha256:" + "0" * 64
BASE = ["launch=kubernetes", "launch.nodes=2", "backend=cpu", "run_dir=/runs/a", f"launch.kubernetes.image={IMAGE}"]
BASE = [*BASE, "launch.kubernetes.claims={runs: /runs}"]
ASCEND = ["backend=ascend", "launch.kubernetes.kind=volcano", "launch.kubernetes.ring_controller=ascend-910b"]
EVERYTHING = [
    *["launch.kubernetes.namespace=team-a", "launch.kubernetes.name=my-job", "launch.kubernetes.queue=research"],
    *["launch.kubernetes.image_pull_secrets=[registry]", "launch.kubernetes.service_account=trainer"],
    *["launch.kubernetes.cpu=64", "launch.kubernetes.memory=512Gi", "launch.kubernetes.shm=64Gi"],
    *["launch.kubernetes.rdma={rdma/hca: 8}", "launch.kubernetes.host_network=true", "launch.kubernetes.ttl_s=3600"],
    *["launch.kubernetes.config_maps={options: /etc/octofold}", "launch.kubernetes.host_paths={/data: /data}"],
    *["launch.kubernetes.secrets={WANDB_API_KEY: wandb/key}", "launch.kubernetes.node_selector={pool: a}"],
    *["launch.kubernetes.tolerations=[a, 'b=c:NoSchedule']", "launch.kubernetes.priority_class=high"],
    *["launch.kubernetes.labels={team: y}", "launch.kubernetes.annotations={example.com/note: 1e3}"],
    *["launch.nproc_per_node=8", "train.global_batch_size=64"],
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
HOSTILE = TEXT | st.text("$(){}`'\"\\\n\t #:&*!|>%@-aA1\u2028\x85\ufeff", max_size=20)


@cache
def job(*texts: str) -> JobConfig:
    composed = compose([*BASE, *texts])
    check(composed.launch)
    return composed


def documents(*texts: str) -> list[dict]:
    """The manifest's documents, the job last."""
    return list(yaml.safe_load_all(prepare(job(*texts), [*BASE, *texts], []).files[MANIFEST]))


CASES = {
    "two CPU nodes": [],
    "one node": ["launch.nodes=1"],
    "NVIDIA": ["backend=cuda", *EVERYTHING, "launch.kubernetes.deadline_s=86400"],
    "NVIDIA by Volcano": ["backend=cuda", "launch.kubernetes.kind=volcano", *EVERYTHING],
    "Ascend": ["backend=ascend", "launch.kubernetes.host_driver=true"],
    "Ascend by Volcano": [*ASCEND, *EVERYTHING],
    "Ascend by rank table": [*ASCEND, "launch.kubernetes.rank_table=true"],
    "Ascend 950": [*ASCEND, "launch.kubernetes.device=huawei.com/npu"],
}


@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_the_manifest_is_valid_by_the_schemas_of_kubernetes_and_of_the_operators(texts):
    for document in documents(*texts):
        require_valid(document)


@pytest.mark.parametrize("kind", ["pytorchjob", "volcano"])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        (["spec"], "maxRetries"),
        (["spec"], "runpolicy"),
        (["metadata"], "lables"),
        ([], "specs"),
        (["template", "spec"], "hostnetwork"),
        (["template", "spec", "containers", 0], "enviroment"),
        (["template", "spec", "securityContext"], "runAsUserId"),
        (["template", "metadata"], "label"),
    ],
)
def test_the_schemas_here_refuse_a_misspelt_field_which_a_server_would_drop(kind, path, name):
    (document,) = documents(f"launch.kubernetes.kind={kind}")
    place = templates(document)[0] if path[:1] == ["template"] else document
    for step in path[1:] if path[:1] == ["template"] else path:
        place = place[step]
    place[name] = "a"
    with pytest.raises(jsonschema.ValidationError, match=name):
        require_valid(document)


def test_the_operator_counts_how_often_pods_are_started_again():
    """It does so where containers are started again in their pods; under ExitCode nothing would end the attempts."""
    (document,) = documents("launch.nodes=3", "launch.kubernetes.max_restarts=5", "train.global_batch_size=6")
    spec = document["spec"]
    assert [replica["restartPolicy"] for replica in spec["pytorchReplicaSpecs"].values()] == ["OnFailure"] * 2
    assert spec["runPolicy"]["backoffLimit"] == 15


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_kubectl_reads_what_was_meant(texts):
    """Its YAML is Go's, to which y, 1e3 and 0o7 are no texts."""
    text = prepare(job(*texts), [*BASE, *texts], []).files[MANIFEST]
    command = ["kubectl", "label", "--local", "--dry-run=client", "-f", "-", "-o", "json", "app.kubernetes.io/x=y"]
    told = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    decoder, read, at = json.JSONDecoder(), [], 0
    while at < len(told.rstrip()):
        document, at = decoder.raw_decode(told, at)
        at += len(told[at:]) - len(told[at:].lstrip())
        del document["metadata"]["labels"]["app.kubernetes.io/x"]
        read.append(document)
    assert read == list(yaml.safe_load_all(text))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_the_engines_own_check_passes_on_what_is_good_and_tells_what_kubectl_says_of_what_is_not():
    good = prepare(job(), BASE, [])
    check_submission(good)
    bad = replace(good, files={MANIFEST: good.files[MANIFEST].replace("kind: PyTorchJob", "kind: [")})
    with pytest.raises(UserError, match=r"kubectl label: .*did not find expected"):
        check_submission(bad)


@given(
    words=st.lists(HOSTILE, max_size=5),
    variables=st.dictionaries(st.text("ABC_", min_size=1, max_size=3), HOSTILE, max_size=3),
)
@settings(deadline=None, max_examples=200)
def test_the_kubelet_hands_escaped_texts_over_unchanged(words, variables):
    assert [expanded(escaped(word), variables) for word in words] == words


@given(words=st.lists(HOSTILE, max_size=5))
@settings(deadline=None, max_examples=100)
def test_yaml_hands_every_text_over_unchanged(words):
    assert yaml.safe_load(manifest([{"words": words, "by": {word: word for word in words}}])) == {
        "words": words,
        "by": {word: word for word in words},
    }


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@given(words=st.lists(HOSTILE, max_size=30))
@settings(deadline=None, max_examples=8)
def test_kubectls_yaml_hands_every_text_over_unchanged(words):
    words += ["y", "n", "1e3", "0o7", "0x1F", "1_000", "~", "", "null", "NO", "2001-01-01", ".inf", "=", "<<", "1:30"]
    data = {f"k{number}": word for number, word in enumerate(words)}
    text = manifest([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data}])
    command = ["kubectl", "label", "--local", "--dry-run=client", "-f", "-", "-o", "json", "a=b"]
    told = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    assert json.loads(told)["data"] == data


@given(text=HOSTILE)
@settings(deadline=None, max_examples=12)
def test_what_a_user_types_reaches_the_process_as_typed(text):
    typed = [*BASE, literal_override("train.sample_prompt", text), literal_override("name", text)]
    config = compose(typed)
    for kind in ("pytorchjob", "volcano"):
        kubernetes = replace(config.launch.kubernetes, kind=kind)
        chosen = replace(config, launch=replace(config.launch, kubernetes=kubernetes))
        (document,) = yaml.safe_load_all(prepare(chosen, typed, []).files[MANIFEST])
        require_valid(document)
        arguments, _ = process(document, 1, {"metadata.labels['volcano.sh/task-index']": "1"})
        assert arguments[: 2 + len(typed)] == ["octofold", "train", *typed]
        assert is_dns_label(f"{document['metadata']['name']}-worker-99999")


@given(text=HOSTILE, other=HOSTILE)
def test_a_name_is_taken_from_the_run_and_two_runs_are_two_jobs(text, other):
    name = job_name(None, text)
    assert is_dns_label(name)
    assert len(name) <= 40
    assert name != job_name(None, other) or text == other


FIELDS = {
    "name": lambda text: {"name": text},
    "namespace": lambda text: {"namespace": text},
    "image": lambda text: {"image": text, "allow_tag": True},
    "service_account": lambda text: {"service_account": text},
    "image_pull_secrets": lambda text: {"image_pull_secrets": [text]},
    "device": lambda text: {"device": text},
    "cpu": lambda text: {"cpu": text},
    "memory": lambda text: {"memory": text},
    "shm": lambda text: {"shm": text},
    "rdma": lambda text: {"rdma": {text: 1}},
    "claims": lambda text: {"claims": {text: "/more", "runs": "/runs"}},
    "claims path": lambda text: {"claims": {"more": text, "runs": "/runs"}},
    "config_maps": lambda text: {"config_maps": {text: "/more"}},
    "host_paths": lambda text: {"host_paths": {text: "/more"}},
    "ring_controller": lambda text: {"ring_controller": text, "kind": "volcano"},
    "secrets": lambda text: {"secrets": {text: "a/b"}},
    "secrets reference": lambda text: {"secrets": {"A": text}},
    "node_selector": lambda text: {"node_selector": {text: "a"}},
    "node_selector value": lambda text: {"node_selector": {"a": text}},
    "labels": lambda text: {"labels": {text: "a"}},
    "labels value": lambda text: {"labels": {"a": text}},
    "annotations": lambda text: {"annotations": {text: "a"}},
    "annotations value": lambda text: {"annotations": {"a": text}},
    "tolerations": lambda text: {"tolerations": [text]},
    "priority_class": lambda text: {"priority_class": text},
    "scheduler": lambda text: {"scheduler": text},
    "queue": lambda text: {"queue": text},
    "program": lambda text: {"program": [text]},
}
LIKELY = st.sampled_from(["a", "a/b", "A_b", "/more", "1", "16Gi", "a=b:NoExecute", "a b", "a\nb", "$(HOME)", "-", "é"])


@pytest.mark.parametrize("field", FIELDS)
@given(text=LIKELY | HOSTILE)
@settings(deadline=None, max_examples=20)
def test_every_field_arrives_unchanged_or_is_refused_by_name(field, text):
    given_values = {"image": IMAGE, "claims": {"runs": "/runs"}, **FIELDS[field](text)}
    kubernetes = KubernetesConfig(**given_values)
    config = replace(job(), launch=replace(job().launch, kubernetes=kubernetes))
    error, submission = _outcome(config)
    if error is not None:
        assert error.key == f"launch.kubernetes.{field.split()[0]}"
        assert re.fullmatch(r".*\n  rule:   .*\n  remedy: .*", str(error))
        return
    (document,) = yaml.safe_load_all(submission.files[MANIFEST])
    require_valid(document)
    found = set(_texts(document))
    parts = re.split({"tolerations": "[:=]", "secrets reference": "/"}.get(field, "(?!)"), text)
    assert found >= {escaped(part) if field == "program" else part for part in parts if part}


def _outcome(config):
    try:
        check_kubernetes(config.launch.kubernetes)
        return None, prepare(config, BASE, [])
    except ConfigError as error:
        return error, None


def _texts(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    else:
        yield tree
