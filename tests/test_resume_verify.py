"""`octofold verify resume`: yes for what is, no with the name of what was lost, and what it refuses."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from run_configs import tiny_run, write_corpus

from octofold.launch.cli import main
from octofold.launch.run_folder import read_config
from octofold.launch.verify import VerifyConfig
from octofold.launch.verify_resume import verify_resume
from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.manifest import write_manifest
from octofold.train.models.config import BalanceConfig
from octofold.train.precision.config import LossScaleConfig
from octofold.train.resume.facts import Course
from octofold.train.resume.prove import Job, Proof, courses, judge, kill, resumed


@pytest.fixture(autouse=True)
def _warm(ranks, monkeypatch):
    """The ranks of other tests: starting processes takes longer than anything else here."""
    monkeypatch.setattr("octofold.launch.verify_resume.warm_ranks", lambda _: nullcontext(ranks))


SMALL = ["model=tiny", "model.num_hidden_layers=2", "parallel.expert=2", "verify.steps=4"]


def answer(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_yes_on_the_same_layout_and_on_another(tmp_path, capsys):
    folder = tmp_path / "out"
    asked = [*SMALL, "precision=fp64", "verify.resume_parallel={tensor:2}", f"run_dir={folder}"]
    assert main(["verify", "resume", *asked]) == 0
    printed = capsys.readouterr()
    assert "other_layout: data_shard=2 expert=2 in fp64, continued on tensor=2, killed in step 4" in printed.err
    same, other, _, said = printed.out.splitlines()
    assert re.fullmatch(r"same_layout: \d{3} numbers and tensors equal to the undisturbed run's bit for bit", same)
    assert re.fullmatch(r"other_layout: \d{3} numbers .* within 1e-09", other)
    assert said == "is a resumed run the same run? yes: killed in step 4, continued from step 2"
    proofs = answer(folder)["proofs"]
    assert list(proofs) == ["same_layout", "other_layout"]
    assert proofs["same_layout"]["differences"] == []
    assert 0 < proofs["other_layout"]["differences"][0]["error"] < 1e-9, "another layout rounds otherwise"
    saved = [path.name for path in (folder / "same_layout" / "resumed" / "checkpoints").iterdir()]
    assert sorted(saved) == ["step_2", "step_4"]
    assert read_config(folder).precision.name == "fp64"


def test_no_is_an_exit_status_and_a_sentence(tmp_path, capsys):
    texts = [*SMALL, f"run_dir={tmp_path / 'out'}"]
    settings = VerifyConfig(steps=3)
    texts.remove("verify.steps=4")
    assert verify_resume(settings, texts, [], task="resume_faults:moments_lost") == 1
    printed = capsys.readouterr().out
    assert "moments of the optimiser are zero" in printed
    assert printed.splitlines()[-1] == "is a resumed run the same run? no: same_layout"
    assert answer(tmp_path / "out")["answer"] == "no"


@pytest.mark.parametrize("small", ["true", "false"])
def test_the_jobs_own_checkpoints_are_left_alone(small, tmp_path, monkeypatch):
    """No run that a verification makes saves into the place of the job's, or looks there."""
    step_3 = tmp_path / "place" / "step_3"
    step_3.mkdir(parents=True)
    write_manifest(folder_at(step_3), {"step": 3})
    jobs: list[Job | None] = []

    def prove(job: Job, *_: Any, other: Job | None, **__: Any) -> Proof:
        jobs.extend([job, other])
        return Proof(True, 0.0, 1, [], [])

    monkeypatch.setattr("octofold.train.resume.prove.prove", prove)
    texts = [*SMALL[:3], f"verify.twin={small}", "verify.resume_parallel={tensor:2}", f"checkpoint.dir={step_3.parent}"]
    assert main(["verify", "resume", *texts, f"run_dir={tmp_path / 'out'}"]) == 0
    assert [job and job.config.checkpoint.dir for job in jobs] == [None] * 4
    assert all(jobs[number] is not None for number in (0, 2, 3))
    assert [path.name for path in step_3.parent.rglob("*")] == ["step_3", "manifest.json"]


STOOD_AT, KILLED_IN, STEPS = 2, 4, 4
PLANTED = {
    "biases_reset": r"expert biases are zero \(model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
    "moments_lost": r"moments of the optimiser are zero \(optim\.",
    "histories_lost": r"FP8 scaling histories are zero \(precision\.",
    "a_weight_lost": r"weights are zero \(model\.layers\.1\.self_attn\.o_proj\.weight\)",
    "cursor_off_by_one": r"data cursor not as it was \(loader\.samples_seen: 17, was 16\): samples",
    "other_order": r"step 3 reads other samples, though the data cursor is the same",
    "loss_scale_reset": r"loss scale not as it was \(.*loss_scale\.scale: 1024, was 4096",
    "updates_forgotten": r"applied updates not as it was \(updates: 0, was 2\)",
    "tokens_forgotten": r"tokens seen not as it was \(tokens_seen: 0, was \d+\)",
    "placement_forgotten": r"expert placement not as it was \(placement\.",
    "schedule_of_the_clock": r"what a checkpoint holds is as it was, and step 3 differs \(",
}

QUICK = ("biases_reset", "moments_lost", "cursor_off_by_one", "loss_scale_reset", "placement_forgotten", "other_order")


@pytest.fixture(scope="module")
def killed(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[Course], Path]:
    """A job with everything that a resume may lose, its undisturbed course, and its folder after a kill.

    Experts that move, multi-token prediction, delayed scaling, a loss scale that grows, compact moments.
    """
    config = tiny_run(
        write_corpus(tmp_path_factory.mktemp("verify")),
        2,
        model={
            "num_hidden_layers": 2,
            "initializer_range": 0.15,
            "num_nextn_predict_layers": 1,
            "balance": BalanceConfig(bias_update_rate=0.02),
        },
        parallel={"expert": 2, "placement_every": 1},
        precision={
            "name": "fp8_tensor_delayed",
            "arithmetic": "emulate",
            "amax_history": 2,
            "loss_scale": LossScaleConfig("dynamic", init=1024.0, growth_interval=1),
        },
        optim={"moments": "fp8"},
        train={"steps": STEPS},
        checkpoint={"every_steps": STOOD_AT, "keep": 0},
    )
    job = Job(config, 2)
    expected = courses(job, tmp_path_factory.mktemp("undisturbed"), ranks, STOOD_AT)
    run_dir = tmp_path_factory.mktemp("killed")
    kill(job, run_dir, ranks, STOOD_AT, KILLED_IN)
    return job, expected, run_dir


def test_a_run_with_everything_is_bit_for_bit(killed, ranks, tmp_path):
    job, expected, folder = killed
    run_dir = Path(shutil.copytree(folder, tmp_path / "run"))
    proof = judge(courses(resumed(job, run_dir), run_dir, ranks, STOOD_AT), expected, STOOD_AT, same_layout=True)
    assert (proof.holds, proof.differences, proof.diagnosis) == (True, [], [])
    assert proof.compared > 300
    stood = expected[0].standings[STOOD_AT]
    assert stood.state["placement"]["orders"], "experts have moved"
    assert stood.state["loss_scale"]["scale"] == 4096
    assert {name.partition(".")[0] for name in stood.tensors} == {"model", "optim", "precision"}
    assert any(name.startswith("model.mtp.") for name in stood.tensors)


@pytest.mark.parametrize(
    "fault", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_a_planted_fault_is_named(fault, killed, ranks, tmp_path):
    job, expected, folder = killed
    run_dir = Path(shutil.copytree(folder, tmp_path / "run"))
    found = courses(resumed(job, run_dir), run_dir, ranks, STOOD_AT, f"resume_faults:{fault}")
    proof = judge(found, expected, STOOD_AT, same_layout=True)
    assert not proof.holds
    (said,) = proof.diagnosis
    assert re.search(PLANTED[fault], said), said


IN_BLOCKS = ["train.global_batch_size=16", "precision=fp8_block", "precision.arithmetic=emulate"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts",
    [
        ["experiment=quickstart", "verify.seeds=2"],
        ["model=deepseek_v3", "parallel.pipeline=2", "parallel.expert=2", "train.micro_batch_size=2", *IN_BLOCKS],
        ["model=deepseek_v2", "parallel.tensor=2", "parallel.context=2", "data.workers=2", *IN_BLOCKS],
        ["model=tiny", "verify.twin=false", "train.global_batch_size=4", "data.sequence_length=64"],
    ],
    ids=" ".join,
)
def test_yes_for_whole_jobs(texts, tmp_path, capsys):
    assert main(["verify", "resume", *texts, f"run_dir={tmp_path / 'out'}"]) == 0
    assert "is a resumed run the same run? yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=auto"], "leave resume out"),
        (["verify.steps=1"], "a step before the kill and one after it"),
        (["verify.resume_parallel={tensr:2}"], "there is no key parallel.tensr"),
        (["parallel.expert=2", "verify.resume_parallel={expert:2}"], "another layout than the run's own"),
        (["verify.resume_parallel=2"], "a mapping such as {a:1,b:2}"),
        (["parallel.expert_route=deepep"], "a resume is verified on CPUs"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "refused",
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "resume", "model=tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left behind"
