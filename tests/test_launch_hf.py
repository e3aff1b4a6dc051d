"""Hugging Face checkpoints both ways through the command line, with transformers as the other side."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import (
    TOKENS_BS,
    all_bytes,
    all_tensors,
    config_of,
    our_logits,
    preset,
    their_logits,
    their_model,
    trained_run,
)
from peers import library, peer_of

from octofold.kernels.reference.block_cast import dequantize_blocks
from octofold.launch.cli import main
from octofold.launch.run_folder import read_config
from octofold.train.data.tokenizer import ByteTokenizer

TOLERANCE = 1e-4
KINDS = ["deepseek_v2_lite_tiny", "deepseek_v2_tiny", "deepseek_v3_tiny", "octofold_1t_tiny"]
ALIGNED: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
"""Every linear layer's sizes are multiples of 128, which transformers 5.23 needs to read FP8 on a CPU."""

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Path:
    """Run a verb that prints a folder."""
    capsys.readouterr()
    assert main([*arguments]) == 0
    return Path(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", KINDS)
def test_transformers_computes_what_we_do(name, tmp_path, capsys):
    run_dir = trained_run(tmp_path, preset(name))
    folder = call(capsys, "export", str(run_dir), "export.precision=fp32", "export.shard_gb=0.0003")
    assert folder == run_dir / "export" / "step_2-fp32"
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, report = their_model(folder)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(key.startswith("model.layers.2.") for key in report["unexpected_keys"]), "MTP alone"
    torch.testing.assert_close(their_logits(model), our_logits(run_dir)[0], rtol=0, atol=TOLERANCE)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = all_tensors(folder)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert config_of(folder)["scoring_func"] == ("softmax" if "v2" in name else "sigmoid")
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "unknown"\n')
    assert "| tokens seen | 1,024 |" in card


@pytest.mark.parametrize("kind", ["V2", "V3"])
@pytest.mark.parametrize("tied", [False, True])
def test_we_compute_what_transformers_saved(kind, tied, tmp_path, capsys):
    model = preset(f"deepseek_{kind.lower()}_tiny", vocab_size=320, tie_word_embeddings=tied)
    peer = peer_of(replace(model, initializer_range=0.15), seed=3).eval()
    peer.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    run_dir = call(capsys, "import", str(tmp_path / "hf"), f"run_dir={tmp_path / 'run'}", "model.name=mine")
    config = read_config(run_dir)
    assert (config.model.name, config.model.num_nextn_predict_layers) == ("mine", 0)
    torch.testing.assert_close(our_logits(run_dir)[0], their_logits(peer), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_multi_token_prediction_loads_in_transformers(tmp_path, capsys):
    """With 61 layers, since the library looks for multi-token prediction in model.layers.61 only."""
    from transformers.modeling_layers import MtpModel

    tiny = {"hidden_size": 32, "n_routed_experts": 8, "moe_intermediate_size": 8, "intermediate_size": 16}
    model = preset("deepseek_v3_tiny", num_hidden_layers=61, first_k_dense_replace=60, **tiny)
    run_dir = trained_run(tmp_path, model)
    folder = call(capsys, "export", str(run_dir), "export.precision=fp32")
    peer, report = their_model(folder)
    assert not report["unexpected_keys"]
    mtp = MtpModel.from_pretrained(peer).eval()
    next_BS = TOKENS_BS.roll(-1, dims=1)
    positions_BS = torch.arange(TOKENS_BS.shape[1]).expand_as(TOKENS_BS)
    with torch.no_grad():
        hidden_BSD = peer.model(TOKENS_BS, use_cache=False).last_hidden_state
        theirs = peer.lm_head(mtp.forward_layer(0, hidden_BSD, positions_BS, None, input_ids=next_BS))
    torch.testing.assert_close(our_logits(run_dir, [next_BS])[1], theirs, rtol=0, atol=TOLERANCE)


def test_export_without_multi_token_prediction(tmp_path, capsys):
    run_dir = trained_run(tmp_path, preset("deepseek_v3_tiny"))
    folder = call(capsys, "export", str(run_dir), "export.mtp=false", f"export.to={tmp_path / 'bare'}")
    assert config_of(folder)["num_nextn_predict_layers"] == 0
    assert not any("layers.2." in name for name in all_tensors(folder))
    _, report = their_model(folder)
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("kind", ["deepseek_v2_tiny", "deepseek_v3_tiny"])
def test_fp8_loads_in_transformers(kind, scale_fmt, tmp_path, capsys):
    run_dir = trained_run(tmp_path, preset(kind, **ALIGNED))
    folder = call(capsys, "export", str(run_dir), "export.precision=fp8", f"export.scale_fmt={scale_fmt}")
    tensors = all_tensors(folder)
    quantised = [name for name in tensors if name + "_scale_inv" in tensors]
    layers = {name.split(".")[-2] for name in quantised}
    assert layers == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    exponents = torch.cat([tensors[f"{name}_scale_inv"].flatten() for name in quantised]).log2()
    assert torch.equal(exponents, exponents.round()) == (scale_fmt == "ue8m0")
    model, report = their_model(folder)
    assert not report["missing_keys"]
    theirs = dict(model.named_parameters())
    for name in quantised:
        if "layers.2." in name:
            continue
        ours = dequantize_blocks(tensors[name], tensors[f"{name}_scale_inv"], block=128)
        if ".experts." in name:
            stem, expert, part, _ = name.rsplit(".", 3)
            fused = theirs[f"{stem}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            width = fused.shape[0] // 2
            seen = {"down_proj": fused, "gate_proj": fused[:width], "up_proj": fused[width:]}[part]
        else:
            seen = theirs[name]
        # The library multiplies in BF16's company; we in FP32.
        torch.testing.assert_close(seen, ours, rtol=0, atol=1e-6, msg=name)
    imported = call(capsys, "import", str(folder), f"run_dir={tmp_path / 'again'}", "data.tokenizer=bytes")
    torch.testing.assert_close(our_logits(imported)[0], their_logits(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("precision", "extra"),
    [
        ("bf16", []),
        ("fp32", []),
        ("fp8", []),
        ("fp8", ["export.scale_fmt=ue8m0"]),
        ("fp8", ["export.block=16"]),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else part,
)
def test_import_export_import_is_the_same_to_the_byte(precision, extra, tmp_path, capsys):
    """With sizes that no block divides: what is FP8 stays FP8."""
    run_dir = trained_run(tmp_path, preset("deepseek_v3_tiny", moe_intermediate_size=24, kv_lora_rank=20))
    how = [f"export.precision={precision}", *extra]
    first = call(capsys, "export", str(run_dir), f"export.to={tmp_path / 'first'}", *how)
    run_1 = call(capsys, "import", str(first), f"run_dir={tmp_path / 'run_1'}")
    second = call(capsys, "export", str(run_1), f"export.to={tmp_path / 'second'}", *how)
    run_2 = call(capsys, "import", str(second), f"run_dir={tmp_path / 'run_2'}")
    assert all_bytes(first) == all_bytes(second)
    assert all_bytes(run_1 / "checkpoints" / "step_0") == all_bytes(run_2 / "checkpoints" / "step_0")
    assert config_of(first) == config_of(second)
    assert all_bytes(first, "tokenizer*") == all_bytes(second, "tokenizer*")
    if precision == "fp8":
        # From the FP8 run to BF16: our own dequantisation.
        plain = all_tensors(call(capsys, "export", str(run_1), "export.precision=fp32"))
        stored, block = all_tensors(first), 16 if "export.block=16" in extra else 128
        for name, tensor in plain.items():
            scale = stored.get(f"{name}_scale_inv")
            expected = stored[name].float() if scale is None else dequantize_blocks(stored[name], scale, block=block)
            assert torch.equal(tensor, expected), name


def test_an_imported_run_trains_and_samples(tmp_path, capsys):
    run_dir = trained_run(tmp_path, preset("deepseek_v3_tiny"))
    folder = call(capsys, "export", str(run_dir), "export.precision=fp8")
    overrides = ["data=text", f"data.path={tmp_path / 'corpus'}", "data.sequence_length=64", "backend=cpu"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "train.global_batch_size=4", "train.eval_sequences=4"]
    overrides += ["precision=fp32", "train.final_eval_sequences=4", "train.sample_tokens=4"]
    overrides += ["optim.lr=0", "model.balance.bias_update_rate=0"]
    imported = call(capsys, "import", str(folder), f"run_dir={tmp_path / 'imported'}", *overrides)
    (before,) = our_logits(imported)
    assert main(["sample", str(imported), "the ", "sample.tokens=5"]) == 0
    assert main(["train", f"resume={imported}", "train.steps=3", "train.log_every=1"]) == 0
    records = [json.loads(line) for line in (imported / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    assert (imported / "checkpoints" / "step_3").is_dir()
    again = call(capsys, "export", str(imported))
    assert "The weights are those of step_2-fp8, trained further:" in (again / "README.md").read_text()
    # Without a learning rate the weights stay what they were.
    assert torch.equal(our_logits(imported)[0], before)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_tokenizer_loads_in_transformers(tokenizer, tmp_path, capsys):
    data = {"tokenizer": tokenizer, "bpe_vocab_size": 300}
    run_dir = trained_run(tmp_path, preset("deepseek_v2_lite_tiny"), **data)
    folder = call(capsys, "export", str(run_dir))
    theirs = library().AutoTokenizer.from_pretrained(folder)
    from octofold.train.data.tokenizer import load_saved_tokenizer

    ours = load_saved_tokenizer(run_dir / "tokenizer")
    for text in ["the quick brown fox", "  two\n\tlines ", "é 日本 🙂", "".join(map(chr, range(1, 300)))]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id == config_of(folder)["eos_token_id"]
    assert ByteTokenizer().vocab_size == 257
    assert TOKENS_BS.max() < 257
