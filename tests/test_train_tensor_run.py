"""Whole runs over tensor, context and replica ranks: validation, resuming on another layout, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.backends.errors import ConfigError

LAYOUTS: list[dict[str, int]] = [
    {"tensor": 2},
    {"context": 2},
    {"data_replicate": 2, "tensor": 2, "expert": 2},
    {"context": 2, "tensor": 2, "expert": 4},
]
V3: dict[str, Any] = {"num_nextn_predict_layers": 1, "q_lora_rank": 24}


def ranks_of(layout: dict[str, int]) -> int:
    return 4 if len(layout) > 1 else 2


def named(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={degree}" for name, degree in layout.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_validation_counts_every_token_once(layout, root, ranks, tmp_path):
    groups: dict[str, Any] = {
        "data": {"mask_documents": True},
        "train": {"eval_sequences": 7, "micro_batch_size": 2},
        "model": V3,
    }
    expected = run_tasks.alone(run_tasks.validate, tiny_run(root, **groups), tmp_path / "1")["record"]
    config = tiny_run(root, ranks_of(layout), parallel=layout, **groups)
    for found in ranks(ranks_of(layout)).run(run_tasks.validate, config, tmp_path / "n"):
        assert found["record"]["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert found["record"]["tokens"] == expected["tokens"]


@pytest.mark.slow
def test_a_run_continues_on_layouts_that_split_other_things(root, ranks, tmp_path):
    """One rank, then split heads, then split positions on replicas, then one again: one curve."""

    def config(n: int, layout: dict[str, int], **more: Any) -> Any:
        return tiny_run(root, n, train={"steps": 8, "micro_batch_size": 1}, parallel=layout, model=V3, **more)

    expected = run_tasks.alone(run_tasks.run, config(1, {}), tmp_path / "whole")
    run_dir = tmp_path / "moved"
    run_tasks.alone(run_tasks.run, config(1, {}), run_dir, 2)
    for n, layout, stop_at in ((2, {"tensor": 2}, 4), (4, {"data_replicate": 2, "context": 2}, 6)):
        ranks(n).run(run_tasks.run, config(n, layout, resume=str(run_dir)), run_dir, stop_at)
    found = run_tasks.alone(run_tasks.run, config(1, {}, resume=str(run_dir)), run_dir)
    assert found["progress"]["step"] == 8
    for a, b in zip(found["records"], expected["records"], strict=True):
        assert (a["step"], a["tokens"], a["expert_load"]) == (b["step"], b["tokens"], b["expert_load"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["mtp_losses"] == pytest.approx(b["mtp_losses"], rel=1e-9)
    for name, tensor in expected["tensors"].items():
        assert found["tensors"][name] == pytest.approx(tensor, rel=1e-7, abs=1e-9), name


@pytest.mark.parametrize(
    ("layout", "groups", "message"),
    [
        ({"tensor": 4}, {"model": {"num_attention_heads": 6}}, "model.num_attention_heads=6 parallel.tensor=4\n"),
        ({"tensor": 4}, {"model": {"intermediate_size": 190}}, "model.intermediate_size=190 parallel.tensor=4\n"),
        ({"tensor": 2}, {"model": {"vocab_size": 257}}, "model.vocab_size=257 parallel.tensor=2\n"),
        ({"context": 4}, {"data": {"sequence_length": 60}}, "into 8 equal parts: 2 for each of several context ranks"),
        ({"tensor": 2, "context": 2}, {"data": {"sequence_length": 36}}, "remedy: data.sequence_length=32"),
    ],
    ids=["heads", "width", "vocabulary", "positions", "positions of both"],
)
def test_what_ranks_do_not_divide_is_refused_before_start(layout, groups, message, root):
    with pytest.raises(ConfigError) as caught:
        tiny_run(root, 4, parallel=layout, train={"micro_batch_size": 1}, **groups)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "block", "message"),
    [
        (
            "fp8_block",
            128,
            "layers.0.self_attn.q_proj has 96 outputs for 2 tensor ranks, in blocks of 128: none is cut",
        ),
        ("fp8_tensor_current", 128, "in one scale a tensor: none is cut"),
    ],
)
def test_a_quantisation_block_is_never_cut(precision, block, message, root, ranks, tmp_path):
    choices = {"name": precision, "arithmetic": "emulate", "block": block}
    config = tiny_run(root, 2, parallel={"tensor": 2}, precision=choices, optim={"moments": "bf16"})
    assert message in ranks(2).run(run_tasks.refusal, config, tmp_path)[0]
