"""`octofold verify layout` from the command line: the answer, what it writes, what it refuses; and the job in small."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from octofold.backends.errors import ConfigError
from octofold.launch.cli import main
from octofold.launch.compose import compose
from octofold.launch.run_folder import read_config
from octofold.launch.verify import VerifyConfig
from octofold.launch.verify_layout import verify_layout
from octofold.parallel.config import ParallelConfig
from octofold.train.config import PrecisionConfig, validate
from octofold.train.layout.twin import shrunk, smallest_world, twin


@pytest.fixture(autouse=True)
def _warm(ranks, monkeypatch):
    """The ranks of other tests: starting processes takes longer than anything else here."""
    monkeypatch.setattr("octofold.launch.verify_layout.warm_ranks", lambda _: nullcontext(ranks))


TINY = ["model=tiny", "model.num_hidden_layers=2", "verify.steps=2"]
EIGHT = [*TINY[:2], "launch.nproc_per_node=8", "parallel.expert=4", "train.global_batch_size=32"]


def test_yes(tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["verify", "layout", *TINY, "parallel.expert=2", f"run_dir={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "does data_shard=2 expert=2 on 2 ranks compute what one rank does? yes: worst relative error" in printed
    assert "allowed 1e-09 in fp64" in printed
    result = json.loads((folder / "result.json").read_text())
    assert (result["answer"], result["ranks"], result["seeds"]["0"]["diagnosis"]) == ("yes", 2, [])
    errors = [difference["error"] for difference in result["seeds"]["0"]["differences"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1e-9
    assert len(errors) > 80
    assert read_config(folder).precision == PrecisionConfig("fp64")


def test_no_names_the_worst_and_the_fault(tmp_path, capsys):
    texts = ["model=tiny", "model.num_hidden_layers=2", "launch.nproc_per_node=2", f"run_dir={tmp_path / 'out'}"]
    status = verify_layout(VerifyConfig(steps=1), texts, [], task="layout_faults:experts_summed_twice")
    assert status == 1
    printed = capsys.readouterr().out
    assert "gradients of all expert weights are 2x those of one rank" in printed
    assert "no: worst relative error 1.0e+00, allowed 1e-09 in fp64" in printed.splitlines()[-1]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["answer"] == "no"
    worst = result["seeds"]["0"]["differences"][0]
    assert (worst["key"]["kind"], round(worst["ratio"], 6)) == ("gradient", 2.0)


def test_a_job_that_shrinks_keeps_what_a_fault_needs_to_show(tmp_path, capsys):
    """Experts that the job has copies of have copies in small, whose gradients are summed."""
    settings = VerifyConfig(steps=1, ranks=4)
    assert verify_layout(settings, [*EIGHT, f"run_dir={tmp_path / 'sound'}"], []) == 0
    assert "does data_shard=4 expert=2 on 4 ranks compute" in capsys.readouterr().out
    fault = "layout_faults:experts_summed_twice"
    assert verify_layout(settings, [*EIGHT, f"run_dir={tmp_path / 'fault'}"], [], task=fault) == 1
    assert "gradients of all expert weights are 2x those of one rank" in capsys.readouterr().out


def test_what_several_nodes_change_is_proved_on_two(tmp_path, capsys):
    """Sums by steps, and the route that `auto` takes there, though the job in small would fit one node."""
    texts = [*EIGHT, "backend.ranks_per_node=4", "backend.all_reduce=hierarchical"]
    settings = VerifyConfig(steps=1, ranks=4)
    assert verify_layout(settings, [*texts, f"run_dir={tmp_path / 'sound'}"], []) == 0
    small = read_config(tmp_path / "sound")
    assert (small.backend.ranks_per_node, small.backend.all_reduce) == (2, "hierarchical")
    fault = "layout_faults:hierarchical_sums_doubled"
    assert verify_layout(settings, [*texts, f"run_dir={tmp_path / 'fault'}"], [], task=fault) == 1


@pytest.mark.slow
def test_a_big_job_is_proved_in_small(tmp_path, capsys):
    """DeepSeek-V3 on 64 ranks, over two seeds."""
    degrees = ["parallel.data_shard=8", "parallel.expert=16", "parallel.context=4", "parallel.tensor=2"]
    batch = ["launch.nproc_per_node=64", "train.global_batch_size=32", "verify.seeds=2", "data.mask_documents=true"]
    folder = tmp_path / "out"
    assert main(["verify", "layout", "model=deepseek_v3", *degrees, *batch, f"run_dir={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "asked for: data_shard=8 context=4 tensor=2 expert=16" in printed
    assert "does data_shard=2 context=2 tensor=2 expert=4 on 8 ranks compute what one rank does? yes" in printed
    assert list(json.loads((folder / "result.json").read_text())["seeds"]) == ["0", "1"]
    assert (folder / "seed_1" / "layout").is_dir()


@pytest.mark.slow
def test_fp8_against_one_rank(tmp_path, capsys):
    asked = ["model=deepseek_v3_tiny", "parallel.expert=2", "precision=fp8_block", "precision.arithmetic=emulate"]
    assert main(["verify", "layout", *asked, "verify.precision=fp8", f"run_dir={tmp_path / 'out'}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "yes: FP8 errs" in line
    assert line.endswith("times as much as on one rank, allowed 1.2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "every degree is 1"),
        (["parallel.expert=3", "train.global_batch_size=12"], "every rank holds the same number of experts"),
        (["parallel.expert=2", "resume=auto"], "leave resume out"),
        (["parallel.expert=2", "parallel.expert_capacity=1.5"], "dropped rank by rank"),
        (["parallel.expert=2", "verify.ranks=1"], "verify.ranks=1"),
        (["parallel.expert=2", "verify.precision=fp16"], "verify.precision is one of: fp64, fp32, fp8"),
        (["parallel.expert=2", "verify.precision=fp8"], "the recipe that is verified is the configured one"),
        (["parallel.data_shard=3", "launch.nproc_per_node=2"], "but the job has 2 rank(s)"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "refused",
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "layout", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({"expert": 4}, 4),
        ({"expert": 4, "tensor": 2}, 4),
        ({"tensor": 2, "context": 2, "data_replicate": 2}, 8),
        ({"data_shard": 3, "expert": 3, "tensor": 2}, 6),
        ({"expert": 6, "tensor": 4}, 12),
        ({}, 1),
    ],
)
def test_the_smallest_world_of_some_degrees(degrees, ranks):
    assert smallest_world(ParallelConfig(**degrees)) == ranks


@pytest.mark.parametrize(
    ("degrees", "most", "expected"),
    [
        ({"data_shard": 8, "expert": 8}, 8, {"data_shard": 8, "expert": 8}),
        ({"data_shard": 64, "expert": 32, "tensor": 2}, 8, {"data_shard": 4, "expert": 4, "tensor": 2}),
        ({"data_shard": 16, "expert": 8}, 8, {"data_shard": 8, "expert": 4}),
        ({"pipeline": 2, "data_shard": 8, "expert": 4}, 8, {"pipeline": 2, "data_shard": 4, "expert": 2}),
        ({"data_shard": 16, "expert": 4, "expert_tensor": 4}, 8, {"data_shard": 8, "expert": 2, "expert_tensor": 4}),
        ({"data_shard": 16, "tensor": 8, "context": 4}, 8, {"data_shard": 2, "tensor": 2, "context": 2}),
        ({"data_replicate": 2, "data_shard": 2, "tensor": 2, "context": 2}, 16, None),
    ],
)
def test_degrees_shrink_and_none_vanishes(degrees, most, expected):
    asked = ParallelConfig(**degrees)
    assert shrunk(asked, most) == (ParallelConfig(**expected) if expected else asked)


@pytest.mark.parametrize(
    ("degrees", "most", "needed"),
    [
        ({"data_replicate": 2, "data_shard": 2, "tensor": 2, "context": 4}, 8, 16),
        ({"data_shard": 9, "expert": 3}, 6, 9),
        ({"data_shard": 4, "expert": 2}, 2, 4),
        ({"pipeline": 2, "data_shard": 8, "expert": 4}, 4, 8),
    ],
)
def test_more_ranks_than_allowed_are_refused_by_their_number(degrees, most, needed):
    with pytest.raises(ConfigError, match=f"verify.ranks={most}(?s:.)*remedy: verify.ranks={needed}, or fewer degrees"):
        shrunk(ParallelConfig(**degrees), most)


@pytest.mark.parametrize(
    "model", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "octofold_1t", "moe_10m", "deepseek_v3_tiny"]
)
def test_the_job_in_small_keeps_its_structure(model, tmp_path):
    job = compose([f"model={model}", "data.mask_documents=true"])
    degrees = ParallelConfig(data_shard=2, tensor=2, context=2, expert=4)
    small = twin(replace(job, parallel=degrees), tmp_path, steps=3, precision=PrecisionConfig("fp64"))
    small = validate(small, 8)
    big, tiny = job.model, small.model
    assert tiny.hidden_size <= 128
    assert tiny.num_hidden_layers <= 8
    assert tiny.n_routed_experts <= 128
    assert tiny.num_experts_per_tok < tiny.n_routed_experts // 2 + 1
    for kept in ("n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob", "tie_word_embeddings"):
        assert getattr(tiny, kept) == getattr(big, kept), kept
    assert (tiny.q_lora_rank is None) == (big.q_lora_rank is None)
    assert bool(tiny.num_nextn_predict_layers) == bool(big.num_nextn_predict_layers)
    assert bool(tiny.first_k_dense_replace) == bool(big.first_k_dense_replace)
    assert tiny.n_shared_experts == big.n_shared_experts
    assert tiny.balance.sequence_loss == big.balance.sequence_loss
    assert small.data.mask_documents
