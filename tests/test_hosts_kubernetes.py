"""The pods of a manifest, as hosts: their own command, in the environment that the operator gives them."""

import signal
import sys
from pathlib import Path

import pytest
import yaml
from hosts import WHY_NOT, ended, hosts
from kubernetes_rules import process
from test_hosts_train import JOB, LIMIT_S, agent, losses, outputs, wait_for_step

from octofold.launch.compose import compose
from octofold.launch.kubernetes import MANIFEST, prepare

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(400),
]


@pytest.mark.parametrize("kind", ["pytorchjob", "volcano"])
def test_two_pods_train_are_evicted_and_go_on(kind, tmp_path: Path):
    run_dir = tmp_path / "run"
    program = f"launch.kubernetes.program=['{sys.executable}',-P,-m,octofold.launch.cli]"
    typed = [*JOB, "launch=kubernetes", f"launch.kubernetes.kind={kind}", "backend=cpu", "train.steps=12", program]
    typed += ["launch.nodes=2", "launch.kubernetes.image=a", "launch.kubernetes.allow_tag=true", f"run_dir={run_dir}"]
    typed += [f"launch.kubernetes.claims={{runs: '{tmp_path}'}}", "name='two $(RANK) pods'"]
    (document,) = yaml.safe_load_all(prepare(compose(typed), typed, []).files[MANIFEST])
    with hosts(2, tmp_path) as group:

        def start() -> list:
            started = []
            for index, host in enumerate(group):
                place = {"metadata.labels['volcano.sh/task-index']": str(index)}
                command, variables = process(document, index, place)
                assert variables["MASTER_ADDR"].startswith(document["metadata"]["name"])
                # What the cluster's DNS makes of the first pod's name.
                variables |= {"MASTER_ADDR": "node0"}
                started.append(host.start(command, tmp_path / f"{host.name}.out", **variables))
            return started

        pods = start()
        wait_for_step(run_dir, 2, pods)
        worker = agent(pods[1])
        worker.send_signal(signal.SIGTERM)
        assert ended(pods, LIMIT_S) == [143, 143], outputs(tmp_path)
        assert max(losses(run_dir)) < 12
        assert ended(start(), LIMIT_S) == [0, 0], outputs(tmp_path)
    assert max(losses(run_dir)) == 12
    assert "name: two $(RANK) pods" in (run_dir / "config.yaml").read_text()
