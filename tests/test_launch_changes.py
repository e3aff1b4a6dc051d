"""What a changed key does to the course of a run: every key has an effect, and those that matter are refused."""

import re
from dataclasses import replace

import pytest

from octofold.backends.errors import UserError
from octofold.launch.changes import RULES, Change, differences, effect, require_allowed
from octofold.launch.compose import keys_of
from octofold.launch.config import JobConfig
from octofold.train.config import OptimConfig


@pytest.mark.parametrize(
    ("key", "saved", "now", "expected"),
    [
        ("name", "a", "b", "none"),
        ("checkpoint.keep", 3, 5, "none"),
        ("train.wandb", False, True, "none"),
        ("data.workers", 0, 4, "none"),
        ("precision.keep_weights", True, False, "none"),
        ("parallel.tensor", 1, 2, "rounding"),
        ("parallel.recompute", "none", "full", "rounding"),
        ("train.micro_batch_size", 4, 2, "rounding"),
        ("backend.threads", 0, 1, "rounding"),
        ("kernels.swiglu", "auto", "reference", "rounding"),
        ("kernels.swiglu", "auto", "mine:swiglu", "course"),
        ("precision.arithmetic", "native", "emulate", "rounding"),
        ("precision.arithmetic", "emulate", "storage", "course"),
        ("parallel.reduce_dtype", "master", "bf16", "course"),
        ("parallel.expert_capacity", 0.0, 1.5, "course"),
        ("train.steps", 10, 20, "length"),
        ("train.global_batch_size", 8, 16, "course"),
        ("train.seed", 0, 1, "course"),
        ("optim.no_decay", ["a"], [], "course"),
        ("data.path", "a", "b", "course"),
        ("data.source", "hub", "text", "course"),
        ("data.source", "text", "hub", "model"),
        ("model.routed_scaling_factor", 1.0, 2.5, "course"),
        ("model.balance.bias_update_rate", 0.001, 0.0, "course"),
        ("model.n_routed_experts", 8, 16, "model"),
        ("model.moe_intermediate_size", 8, 16, "model"),
        ("a_key_of_tomorrow", 1, 2, "course"),
    ],
)
def test_the_effect_of_a_key(key, saved, now, expected):
    assert effect(key, saved, now) == expected


def test_a_renamed_key_does_not_fall_out_of_its_rule_in_silence():
    keys = list(keys_of(JobConfig))
    for _, pattern in RULES:
        assert any(re.fullmatch(pattern, key) for key in keys), pattern
    free = {key.partition(".")[0] for key in keys if effect(key, "a", "b") == "none"}
    assert free >= {"name", "run_dir", "resume", "resume_allow", "launch", "checkpoint", "train", "data"}
    shapes = {key.removeprefix("model.") for key in keys if effect(key, "1", "2") == "model"}
    assert shapes == {
        *("architecture", "vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace"),
        *("intermediate_size", "moe_intermediate_size", "tie_word_embeddings", "num_attention_heads", "q_lora_rank"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"),
        *("n_shared_experts", "scoring_func", "topk_method", "num_nextn_predict_layers", "data.bpe_vocab_size"),
    }


def test_differences_are_listed_by_weight():
    saved = JobConfig()
    now = replace(saved, name="other", optim=OptimConfig(lr=1.0), model=replace(saved.model, hidden_size=8))
    assert [str(change) for change in differences(saved, now)] == [
        "model.hidden_size: 256 -> 8",
        "optim.lr: 0.002 -> 1.0",
        "name: run -> other",
    ]
    assert differences(saved, saved) == []


def test_remedies():
    course, model = Change("optim.lr", 1, 2, "course"), Change("model.hidden_size", 1, 2, "model")
    with pytest.raises(UserError) as error:
        require_allowed([course], ["data.*"], "runs/a")
    assert "allow them: 'resume_allow=[data.*,optim.lr]'" in str(error.value)
    with pytest.raises(UserError) as error:
        require_allowed([model, course], ["*"], "runs/a")
    assert "resume_allow" not in str(error.value)
    require_allowed([course], [], "runs/a", begun=False)
