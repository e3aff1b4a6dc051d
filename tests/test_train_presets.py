"""The published models to the last parameter, tiny twins, and what does not fit refused before it is allocated."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import rank_tasks
import torch
from run_configs import tiny_run, write_corpus
from torch.distributed.fsdp import FSDPModule

from octofold.backends.errors import ConfigError
from octofold.kernels.config import KernelsConfig
from octofold.kernels.registry import Workload, choose
from octofold.launch.compose import compose
from octofold.train.build import BuiltModel, build_engine, draft_model, materialise
from octofold.train.config import OptimConfig, validate
from octofold.train.main import train
from octofold.train.memory import MemoryNeed, ParameterCount, count_parameters, require_memory
from octofold.train.models.config import ModelConfig
from octofold.train.models.decoder import Decoder

BIG = ["deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "octofold_1t"]
PRESETS = [path.stem for path in (Path(__file__).parent.parent / "configs" / "model").glob("*.yaml")]
SIZES = re.compile(
    "name|vocab_size|hidden_size|num_hidden_layers|first_k_dense_replace|intermediate_size|initializer_range|"
    "max_position_embeddings|num_attention_heads|q_lora_rank|kv_lora_rank|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|"
    "n_routed_experts|num_experts_per_tok|moe_intermediate_size|n_group|topk_group"
)
"""What a twin may change; of these, null and 1 are kinds."""


def preset(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp"),
    [
        ("deepseek_v2_lite", 15_706_484_224, 2_661_150_208, 0),
        ("deepseek_v2", 235_741_434_880, 21_375_800_320, 0),
        ("deepseek_v3", 671_026_404_352, 37_552_282_624, 11_610_067_968),
        ("octofold_1t", 1_008_853_392_384, 31_865_773_056, 17_162_146_816),
    ],
)
def test_counts(name, total, active, mtp):
    config = preset(name)
    kernels, _ = choose(KernelsConfig(), Workload("cpu", torch.bfloat16))
    with torch.device("meta"):
        model = Decoder(config, kernels)
    share = config.num_experts_per_tok / config.n_routed_experts
    assert count_parameters(model, model.plan(), share) == ParameterCount(total, active, mtp)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal(name):
    config = validate(compose([f"model={name}"]), 1)
    assert config.model.name == name


@pytest.mark.parametrize("name", BIG)
def test_a_twin_has_the_kinds_of_its_big_one(name):
    big, tiny = asdict(preset(name)), asdict(preset(f"{name}_tiny"))
    for key, value in big.items():
        if not SIZES.fullmatch(key):
            values = [value, tiny[key]]
            if key == "rope_scaling":
                values = [{k: v for k, v in x.items() if not k.startswith("original")} for x in values]
            assert values[0] == values[1], key
        elif value in (None, 1) or tiny[key] in (None, 1):
            assert (value in (None, 1)) == (tiny[key] in (None, 1)) or key == "first_k_dense_replace", key


@pytest.mark.parametrize("name", BIG)
def test_a_twin_trains(name, tmp_path):
    config = tiny_run(write_corpus(tmp_path))
    model = replace(preset(f"{name}_tiny"), num_hidden_layers=2)
    train(replace(config, model=model), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert ("mtp_losses" in records[0]) == (model.num_nextn_predict_layers > 0)


def drafted(tmp_path: Path, precision: str, micro: int, training: bool = True) -> BuiltModel:
    """The tiny V3 on one rank with a global batch of 8 sequences, on the meta device."""
    run = tiny_run(tmp_path, precision={"name": precision}, train={"micro_batch_size": micro})
    model = replace(preset("deepseek_v3_tiny"), vocab_size=100)
    return draft_model(replace(run, model=model), torch.device("cpu"), 0, training=training)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(("precision", "compute", "master"), [("fp64", 8, 8), ("bf16", 2, 4)])
def test_bytes_of_one_rank(precision, compute, master, tmp_path):
    write_corpus(tmp_path)
    built = drafted(tmp_path, precision, micro=8)
    numbers = {name: p.numel() for name, p in built.model.named_parameters()}
    assert all(p.is_meta for p in built.model.parameters())
    total = sum(numbers.values())
    root = sum(n for name, n in numbers.items() if name.startswith(("embed_tokens", "norm", "lm_head")))
    largest = sum(n for name, n in numbers.items() if name.startswith("mtp.0."))
    # Weight, gradient and two moments; then weights that are gathered and the next layer's, and gradients twice.
    gathered = (root + 2 * largest) * compute + (root + largest) * (compute + master)
    assert (built.need.state_bytes, built.need.gathered_bytes) == (total * master * 4, gathered)
    weights = drafted(tmp_path, precision, micro=8, training=False).need
    assert (weights.state_bytes, weights.gathered_bytes) == (total * master, (root + 2 * largest) * compute)
    accumulating = drafted(tmp_path, precision, micro=4).need
    assert accumulating.gathered_bytes == (root + 3 * largest) * compute + total * master


@pytest.mark.usefixtures("world_of_one")
def test_gradients_that_wait_are_counted(tmp_path):
    """What FSDP holds after a micro-batch that is not the last."""
    write_corpus(tmp_path)
    built = drafted(tmp_path, "bf16", micro=4)
    materialise(built, torch.device("cpu"), seed=0)
    engine = build_engine(built.model, OptimConfig(), 1)
    tokens_BS = torch.zeros(1, 8, dtype=torch.int64)
    logits = built.model(tokens_BS, torch.arange(8)[None], ahead=[tokens_BS])
    engine.backward(sum(x.float().square().mean() for x in logits), last=False)
    waiting_bytes = 0
    for module in built.model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            waiting_bytes += sum(p.unsharded_accumulated_grad.nbytes for p in group.fsdp_params if group)
    assert waiting_bytes == 4 * sum(p.numel() for p in built.model.parameters())
    assert waiting_bytes < built.need.gathered_bytes


@pytest.mark.parametrize(("world", "expert"), [(2, 1), (2, 2), (4, 2)])
def test_bytes_of_several_ranks(ranks, world, expert):
    model = replace(preset("deepseek_v3_tiny"), vocab_size=100)
    alone, needs = ranks(1).run(rank_tasks.need, model)[0], ranks(world).run(rank_tasks.need, model, expert)
    assert sum(need.state_bytes for need in needs) == alone.state_bytes
    for need in needs:
        assert need.expert_bytes == alone.expert_bytes // expert
        assert need.gathered_bytes == alone.gathered_bytes - alone.expert_bytes + need.expert_bytes


GIB = 2**30


def refusal(need: MemoryNeed, memory_gib: int, ranks: int = 2) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        require_memory(
            "m",
            ParameterCount(1000, 100, 10),
            need,
            memory_bytes=memory_gib * GIB,
            ranks=ranks,
            expert=1,
            experts=16,
            device=torch.device("cpu"),
        )
    return caught.value


@pytest.mark.usefixtures("world_of_one")
def test_refusal_says_how_many_ranks_would_do():
    need = MemoryNeed(state_bytes=8 * GIB, gathered_bytes=GIB, expert_bytes=0, accumulates=False)
    message = refusal(need, 3)
    assert "1,000 parameters, 100 active, 10 more for multi-token prediction, on 2 rank(s)" in str(message)
    assert (
        "8.0 GiB of weights, gradients and moments and 1.0 GiB of gathered layers and their gradients" in message.rule
    )
    assert message.remedy.startswith("at least 8 ranks of this size hold it, with parallel.expert=1;")
    # 8 GiB on 2 ranks are 16; experts of 4 GiB split in two leave room for 6 - 1 - 2 GiB a rank.
    need = MemoryNeed(state_bytes=8 * GIB, gathered_bytes=5 * GIB, expert_bytes=4 * GIB, accumulates=True)
    message = refusal(need, 6)
    assert message.remedy.startswith("at least 6 ranks of this size hold it, with parallel.expert=2; parallel.accum")
    assert "the unreduced gradients of all" in message.rule
    assert refusal(need, 1).remedy.startswith("no number of ranks of this size holds it: 1.0 GiB are gathered without")


REFUSED = """
import pathlib, re, sys
from octofold.launch.cli import main
status = main(["train", "model=deepseek_v3", "backend=cpu", f"run_dir={sys.argv[1]}"])
# Not ru_maxrss, which a process inherits from the one that started it.
print(status, int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_a_large_model_is_refused_before_it_is_allocated(tmp_path):
    command = [sys.executable, "-c", REFUSED, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    status, peak_mib = map(int, done.stdout.split())
    assert status == 2
    assert "671,026,404,352 parameters, 37,552,282,624 active, 11,610,067,968 more" in done.stderr
    assert peak_mib < 1500, "PyTorch alone takes a few hundred"
    assert not list((tmp_path / "run").glob("*.yaml"))
