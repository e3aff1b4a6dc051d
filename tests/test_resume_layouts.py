"""Saved under one layout, continued under another: what is loaded is the same to the bit, later steps within 1e-9."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layout_cases import Case, run_of

from octofold.train.config import CheckpointConfig, PrecisionConfig, RunConfig
from octofold.train.resume.facts import Course
from octofold.train.resume.prove import Job, Proof, courses, judge
from octofold.train.resume.verdict import samples_of

STOOD_AT, STEPS = 2, 4
LAYOUTS = {
    "data_shard": Case("data_shard=2"),
    "expert": Case("expert=4"),
    "tensor": Case("tensor=2"),
    "context": Case("context=2"),
    "pipeline": Case("pipeline=2", micro=1),
    "mixture": Case("data_replicate=2 tensor=2 expert=2"),
}
ONE = Case("data_shard=1")
ALL = [(saved, now) for saved in LAYOUTS for now in LAYOUTS if saved != now]
QUICK = [("pipeline", "mixture")]
"""What the default suite proves; a third of the rest is slow, and all of it the matrix."""
SOURCES = [name for name in LAYOUTS if name in {saved for saved, _ in QUICK}]
IN_FP8 = PrecisionConfig("fp8_tensor_delayed", arithmetic="emulate", amax_history=2, watch_every=0)
IN_BLOCKS = PrecisionConfig("fp8_block", arithmetic="emulate", block=16, watch_every=0)


def job_of(case: Case, root: Path, precision: PrecisionConfig | None = None) -> Job:
    config, ranks = run_of("v3", case, root, "data.mask_documents=true")
    train = replace(config.train, steps=STEPS)
    config = replace(config, train=train, checkpoint=CheckpointConfig(every_steps=STOOD_AT, keep=0))
    return Job(config if precision is None else replace(config, precision=precision), ranks)


Saved = Callable[..., tuple[Path, list[Course]]]


@pytest.fixture(scope="module")
def saved(ranks: Any, layout_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(case)`: the checkpoint of a run under that layout that nobody disturbs, and its course; run once."""
    done: dict[str, tuple[Path, list[Course]]] = {}

    def run(case: Case, precision: PrecisionConfig | None = None) -> tuple[Path, list[Course]]:
        if (key := f"{case} {precision}") not in done:
            run_dir = tmp_path_factory.mktemp("saved")
            found = courses(job_of(case, layout_root, precision), run_dir, ranks, STOOD_AT)
            done[key] = run_dir / "checkpoints" / f"step_{STOOD_AT}", found
        return done[key]

    return run


def continued(checkpoint: Path, job: Job, run_dir: Path, ranks: Any) -> list[Course]:
    config: RunConfig = replace(job.config, resume=str(checkpoint))
    return courses(replace(job, config=config), run_dir, ranks, STOOD_AT)


def told(proof: Proof) -> str:
    return "\n".join([*proof.diagnosis, *map(str, proof.differences[:5])])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.matrix if n % 3 else pytest.mark.slow)
        for n, pair in enumerate(ALL)
    ],
)
def test_saved_under_one_layout_and_continued_under_another(before, now, saved, layout_root, ranks, tmp_path):
    """Held to the undisturbed run on the layout that saved, which itself computes what one rank does."""
    checkpoint, source = saved(LAYOUTS[before])
    found = continued(checkpoint, job_of(LAYOUTS[now], layout_root), tmp_path, ranks)
    proof = judge(found, source, STOOD_AT, same_layout=False)
    print(f"{before} -> {now}: {proof.compared} compared, worst {proof.differences[0].error:.1e}")
    assert proof.holds, told(proof)
    assert proof.compared > 400


@pytest.mark.parametrize(
    "layout",
    [name if name in ("pipeline", "mixture") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_the_same_layout_is_bit_for_bit(layout, saved, layout_root, ranks, tmp_path):
    checkpoint, source = saved(LAYOUTS[layout])
    found = continued(checkpoint, job_of(LAYOUTS[layout], layout_root), tmp_path, ranks)
    proof = judge(found, source, STOOD_AT, same_layout=True)
    assert (proof.holds, proof.differences) == (True, []), told(proof)


@pytest.mark.parametrize(
    ("before", "now", "precision"),
    [
        ("expert", "context", IN_FP8),
        pytest.param("pipeline", "mixture", IN_BLOCKS, marks=pytest.mark.slow),
        pytest.param("tensor", "expert", IN_BLOCKS, marks=pytest.mark.slow),
    ],
    ids=lambda part: part.name if isinstance(part, PrecisionConfig) else part,
)
def test_fp8_goes_on_under_another_layout(before, now, precision, saved, layout_root, ranks, tmp_path):
    """Histories of delayed scaling, moments and biases are the same to the bit; the losses within what FP8 rounds."""
    checkpoint, source = saved(LAYOUTS[before], precision)
    found = continued(checkpoint, job_of(LAYOUTS[now], layout_root, precision), tmp_path, ranks)
    proof = judge(found, source, STOOD_AT, same_layout=False, exact=True)
    assert proof.holds, told(proof)
    histories = [name for name in source[0].standings[STOOD_AT].tensors if name.startswith("precision.")]
    assert bool(histories) == (precision == IN_FP8)
    for step in range(STOOD_AT + 1, STEPS + 1):
        assert found[0].reports[step]["loss"] == pytest.approx(source[0].reports[step]["loss"], rel=2e-3)
        assert samples_of(found, step) == samples_of(source, step)


@pytest.mark.parametrize("layouts", [SOURCES, pytest.param(list(LAYOUTS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_layout_reads_the_same_samples_in_each_step(layouts, saved, layout_root, ranks, tmp_path):
    """Each once, in one global order, also where a run is continued on another number of ranks."""
    _, alone = saved(ONE)
    orders = {step: samples_of(alone, step) for step in range(1, STEPS + 1)}
    everything = [sample for order in orders.values() for sample in order]
    assert len(set(everything)) == len(everything) == STEPS * 8
    tokens = [alone[0].reports[step]["tokens"] for step in orders]
    for name in layouts:
        _, found = saved(LAYOUTS[name])
        assert {step: samples_of(found, step) for step in orders} == orders, name
        assert [found[0].reports[step]["tokens"] for step in orders] == tokens, "labels are counted alike"
    checkpoint, _ = saved(LAYOUTS["mixture"])
    found = continued(checkpoint, job_of(LAYOUTS["data_shard"], layout_root), tmp_path, ranks)
    for step in range(STOOD_AT + 1, STEPS + 1):
        assert samples_of(found, step) == orders[step]
