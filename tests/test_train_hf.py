"""Hugging Face checkpoints that are wrong, and disks that are full: every fault named, nothing left behind."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import all_tensors, preset, trained_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from octofold.backends.errors import UserError
from octofold.launch.hf import export_run, import_checkpoint
from octofold.launch.run_folder import read_config
from octofold.train.checkpoint.folders import folder_at
from octofold.train.checkpoint.manifest import read_manifest, write_manifest
from octofold.train.models.config import ModelConfig, RopeScalingConfig
from octofold.train.models.hf_config import fp8_block, from_hf, to_hf
from octofold.train.models.hf_names import hf_tensors

SHARED = Path(__file__).parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("hf"), preset("deepseek_v3_tiny"))


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    return export_run(str(run_dir), ["export.precision=fp8", "export.block=16", "export.shard_gb=0.0002"])


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> None:
    """Rewrite a checkpoint as one file with changed tensors and keys of config.json."""
    tensors = all_tensors(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    document = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v != "absent"}))


def refused(folder: Path, tmp_path: Path, *overrides: str) -> str:
    """The message of an import that fails and leaves nothing."""
    with pytest.raises(UserError) as caught:
        import_checkpoint(str(folder), [f"run_dir={tmp_path / 'run'}", *overrides])
    assert not (tmp_path / "run").exists()
    message = str(caught.value)
    assert "rule:" in message
    assert "remedy:" in message
    return message


Q, NORM, EXPERT = "model.layers.0.self_attn.q_a_proj.weight", "model.norm.weight", "model.layers.1.mlp.experts.3"


def test_every_wrong_tensor_is_named(copy, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM], tensors[f"{EXPERT}.up_proj.weight"], tensors[Q + "_scale_inv"]
        tensors["model.layers.0.mlp.extra.weight"] = torch.ones(3, 4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.embed_tokens.weight"] = torch.ones(320, 65)
        tensors["lm_head.weight"] = torch.ones(320, 64, dtype=torch.int64)
        tensors[f"{EXPERT}.down_proj.weight_scale_inv"] = torch.ones(1, 1)
        tensors["model.layers.1.mlp.experts.5.gate_proj.weight"] = torch.ones(32, 64)

    edit(copy, change)
    message = refused(copy, tmp_path)
    for line in [
        f"{NORM}: missing, [64] expected",
        f"{EXPERT}.up_proj.weight: missing, [32, 64] expected",
        f"{Q}_scale_inv: missing, [3, 4] expected",
        "model.layers.0.mlp.extra.weight: unknown, [3, 4]",
        "model.embed_tokens.weight: [320, 65], but config.json makes it [320, 64]",
        "lm_head.weight: torch.int64 is not read here",
        f"{EXPERT}.down_proj.weight_scale_inv: torch.float32 [1, 1], but [4, 2] of FP32 or E8M0 expected",
        "layers.1.mlp.experts.gate_up_proj: its parts have several types",
    ]:
        assert line in message
    assert "inv_freq" not in message


def test_a_long_list_is_cut(copy, tmp_path):
    edit(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name] and None)
    assert "… and " in refused(copy, tmp_path)


def test_numbers_that_are_not_finite_are_all_named(copy, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][5] = torch.nan
        tensors[f"{EXPERT}.up_proj.weight"].view(torch.uint8)[2, 2] = 0x7F
        tensors[f"{EXPERT}.up_proj.weight_scale_inv"][0, 0] = torch.inf

    edit(copy, change)
    message = refused(copy, tmp_path)
    assert "3 fault(s)" in message
    for name in (NORM, f"{EXPERT}.up_proj.weight", f"{EXPERT}.up_proj.weight_scale_inv"):
        assert f"{name}: holds numbers that are not finite" in message


def test_damaged_files_are_all_named(copy, tmp_path):
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    message = refused(copy, tmp_path)
    assert f"{first} cannot be read: it holds" in message
    assert f"{second} cannot be read: No such file" in message


def test_an_index_that_disagrees_with_its_files(copy, tmp_path):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = index["weight_map"].pop(NORM)
    path.write_text(json.dumps(index))
    message = refused(copy, tmp_path)
    assert "model.ghost: missing from model-" in message
    index["weight_map"].pop("model.ghost")
    path.write_text(json.dumps(index))
    assert f"{NORM}: in model-" in refused(copy, tmp_path)
    for name in ("../x.safetensors", 3):
        index["weight_map"][NORM] = name
        path.write_text(json.dumps(index))
        assert f"{NORM} lies in {name!r}, which is no file's name" in refused(copy, tmp_path)
    path.write_text("{")
    assert "index.json cannot be read" in refused(copy, tmp_path)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"attention_bias": True}, "attention_bias=True (only False)"),
        (
            {"hidden_act": "gelu", "moe_layer_freq": 2},
            "gelu (only silu); config.json: moe_layer_freq=2 (only 1)",
        ),
        ({"index_topk": 2048}, "index_topk=2048 (sparse attention)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type linear (only default and yarn)"),
        (
            {"rope_scaling": {"type": "yarn", "attention_factor": 2}},
            "attention_factor=2 (unknown for yarn)",
        ),
        (
            {"vocab_size": "absent", "hidden_size": None},
            "vocab_size is missing; config.json: hidden_size=None",
        ),
        ({"num_hidden_layers": "two"}, "num_hidden_layers=two (a whole number)"),
        (
            {"hidden_size": 64.0, "n_group": True},
            "hidden_size=64.0 (a whole number); config.json: n_group=True",
        ),
        ({"routed_scaling_factor": "absent"}, "routed_scaling_factor is missing"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings=yes (true or false)"),
        ({"model_type": ["deepseek_v3"]}, "model_type=['deepseek_v3']"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax (deepseek_v3 has sigmoid)"),
        ({"topk_method": 3}, "topk_method=3 (deepseek_v3 has noaux_tc)"),
        (
            {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
            "norm_topk_prob=True",
        ),
        ({"rope_scaling": [1]}, "rope_scaling=[1] (keys and values)"),
        ({"rope_scaling": {"type": "yarn", "factor": "forty"}}, "factor=forty (a number)"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 9, "mscale_all_dim": 1}},
            "rope_scaling.mscale is missing",
        ),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling.factor=4 (unknown for default)"),
        ({"quantization_config": [1]}, "quantization_config=[1]"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "'weight_block_size': 128"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "'weight_block_size': [0, 0]"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "mx"}},
            "'scale_fmt': 'mx'",
        ),
        ({"quantization_config": "absent"}, "weight: FP8, and config.json has no quantization_config"),
        ({"n_group": 5}, "model.n_routed_experts=16 model.n_group=5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
    ],
)
def test_configs_we_do_not_compute(config, shown, copy, tmp_path):
    edit(copy, lambda tensors: None, **config)
    assert shown in refused(copy, tmp_path)


def test_folders_that_are_no_checkpoint(copy, tmp_path):
    assert "holds no config.json" in refused(tmp_path / "nowhere", tmp_path)
    for path in [*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"]:
        path.unlink()
    assert "there is neither model.safetensors nor model.safetensors.index.json" in refused(copy, tmp_path)
    (copy / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(copy, tmp_path)


def test_overrides_of_the_model_are_refused(exported, tmp_path):
    assert "model.hidden_size=8" in refused(exported, tmp_path, "model.hidden_size=8")
    assert "model=tiny" in refused(exported, tmp_path, "model=tiny")
    assert "resume=auto" in refused(exported, tmp_path, "resume=auto")
    assert "parallel.expert=5" in refused(
        exported, tmp_path, "parallel.expert=5", "launch.nproc_per_node=5", "train.global_batch_size=20"
    )


def test_multi_token_prediction_that_differs_or_is_absent(copy, tmp_path, capsys):
    copies = "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in copies:
            tensors[name][7, 7] += 1

    edit(copy, change)
    message = refused(copy, tmp_path)
    assert f"{copies[0]}: differs from model.embed_tokens.weight" in message
    assert f"{copies[1]}: differs from lm_head.weight" in message
    with_less = import_checkpoint(str(copy), [f"run_dir={tmp_path / 'less'}", "model.num_nextn_predict_layers=0"])
    assert not any(".mtp." in name for name in all_tensors(with_less / "checkpoints" / "step_0"))
    assert "of which all or none are read" in refused(copy, tmp_path, "model.num_nextn_predict_layers=2")
    edit(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name] and None)
    run_dir = import_checkpoint(str(copy), [f"run_dir={tmp_path / 'without'}"])
    assert "the files hold none" in capsys.readouterr().err
    assert "num_nextn_predict_layers: 0" in (run_dir / "config.yaml").read_text()


def test_an_existing_run_or_folder_is_left_alone(run_dir, exported, tmp_path):
    with pytest.raises(UserError, match="a new run needs a folder that holds no run"):
        import_checkpoint(str(exported), [f"run_dir={run_dir}"])
    assert (run_dir / "checkpoints").is_dir()
    assert (run_dir / "tokenizer").is_dir()
    with pytest.raises(UserError, match="is there already"):
        export_run(str(run_dir), [f"export.to={exported}"])
    with pytest.raises(UserError, match=r"the run's checkpoints are: step_2"):
        export_run(str(run_dir / "checkpoints" / "step_7"), [])


@pytest.mark.parametrize(
    "override",
    [
        "export.precision=int8",
        "export.scale_fmt=e8",
        "export.block=0",
        "export.block=100000",
        "export.shard_gb=0",
        "export.too=x",
    ],
)
def test_export_keys(override, run_dir):
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        export_run(str(run_dir), [override])


def broken_run(run_dir: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The run with a checkpoint of one file, changed."""
    broken = Path(shutil.copytree(run_dir, tmp_path / "broken", ignore=shutil.ignore_patterns("export")))
    folder = broken / "checkpoints" / "step_2"
    tensors, state = all_tensors(folder), read_manifest(folder).state
    change(tensors)
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file)
    write_manifest(folder_at(folder), state)
    return broken


def test_export_names_every_wrong_tensor(run_dir, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.stranger"] = torch.ones(2)
        tensors["model.lm_head.weight"] = torch.ones(3, 3)

    with pytest.raises(UserError) as caught:
        export_run(str(broken_run(run_dir, tmp_path, change)), [f"export.to={tmp_path / 'out'}"])
    for line in ["norm.weight: missing, [64] exp", "stranger: unknown, [2]", "lm_head.weight: [3, 3], [320, 64] exp"]:
        assert f"model.{line}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_export_names_every_number_that_is_not_finite(precision, run_dir, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan
        tensors["model.layers.1.mlp.experts.down_proj"][5, 1, 1] = torch.inf

    broken = broken_run(run_dir, tmp_path, change)
    with pytest.raises(UserError) as caught:
        export_run(str(broken), [f"export.to={tmp_path / 'out'}", f"export.precision={precision}"])
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.down_proj[5]"):
        assert f"{name}: holds numbers that are not finite" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


CRAMPED = """
import resource, signal, sys
from octofold.launch.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_without_room_for_it(run_dir, exported, tmp_path):
    """A bound on the size of files fails as a full disk does, in the middle of a write."""
    assert resource.RLIMIT_FSIZE
    assert signal.SIGXFSZ
    for arguments in (
        ["export", str(run_dir), f"export.to={tmp_path / 'out'}"],
        ["import", str(exported), f"run_dir={tmp_path / 'run'}"],
    ):
        command = [sys.executable, "-c", CRAMPED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        assert "could not be written: File too large" in done.stderr
        assert "nothing of this one was left behind" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_known_beforehand(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"GB are to be written, and 0\.00 GB are free"):
        export_run(str(run_dir), [f"export.to={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == []


yarn = st.builds(
    RopeScalingConfig,
    type=st.just("yarn"),
    factor=st.floats(1, 64),
    original_max_position_embeddings=st.integers(1, 9999),
    mscale=st.sampled_from([0.707, 1.0]),
    mscale_all_dim=st.sampled_from([0.0, 1.0]),
)


@given(
    rope=st.just(RopeScalingConfig()) | yarn,
    rank=st.none() | st.integers(1, 99),
    tied=st.booleans(),
    depths=st.integers(0, 2),
    scale=st.sampled_from([1.0, 2.5, 16.0]),
)
def test_config_json_comes_back(rope, rank, tied, depths, scale):
    model = ModelConfig(
        vocab_size=320,
        max_position_embeddings=99,
        rope_scaling=rope,
        q_lora_rank=rank,
        tie_word_embeddings=tied,
        num_nextn_predict_layers=depths,
        routed_scaling_factor=scale,
    )
    document = to_hf(model, dtype="bfloat16", sequence_length=7, bos_id=None, eos_id=5, quantization=None)
    assert from_hf(json.loads(json.dumps(document))) == model
    assert fp8_block(document) is None


def test_the_released_names_and_sizes():
    """Of DeepSeek-V3's index: so many tensors a layer, and none of our own making."""
    names = {tensor.name: tensor for tensor in hf_tensors(preset("deepseek_v3", num_hidden_layers=61))}
    assert names["model.layers.61.shared_head.head.weight"].copy
    assert names["model.layers.3.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert names["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert sum(name.startswith("model.layers.3.") for name in names) == 9 + 2 + 3 + 3 * 256


@pytest.mark.parametrize("name", ["DeepSeek V2 (lite)", "a=b,c", "it's {x}", "模型"])
def test_folders_of_any_name(name, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / name))
    run_dir = import_checkpoint(str(folder), [f"run_dir={tmp_path / 'run'}"])
    assert read_config(run_dir).name == f"import-{name}"


def test_what_came_with_the_weights_goes_on(copy, tmp_path):
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "generation_config.json").write_text('{"temperature": 0.6}')
    edit(copy, lambda tensors: None, bos_token_id=3, eos_token_id=[7, 8])
    run_dir = import_checkpoint(str(copy), [f"run_dir={tmp_path / 'run'}"])
    folder = export_run(str(run_dir), ["export.precision=fp8"])
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (copy / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [7, 8])
    # The source's block of 16, not the default of 128.
    assert config["quantization_config"]["weight_block_size"] == [16, 16]
    card = (folder / "README.md").read_text()
    assert "The weights are those of copy." in card
    assert "tokens seen" not in card


@pytest.mark.parametrize(
    ("changed", "shown"),
    [({"norm_topk_prob": True}, "norm_topk_prob=true"), ({"num_nextn_predict_layers": 1}, "export.mtp=false")],
)
def test_what_readers_would_compute_otherwise_is_not_exported(changed, shown, tmp_path):
    run_dir = trained_run(tmp_path, preset("deepseek_v2_tiny", **changed))
    with pytest.raises(UserError, match=shown):
        export_run(str(run_dir), [])


def test_a_licence_is_quoted(run_dir, tmp_path):
    import yaml

    folder = export_run(str(run_dir), [f"export.to={tmp_path / 'out'}", "export.license='a: b'"])
    front = (folder / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "a: b"
