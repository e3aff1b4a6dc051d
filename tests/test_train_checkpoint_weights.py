"""Checkpoints read in windows, whoever wrote them, and checkpoints of weights only, in FP8 too, on any layout."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import rank_tasks
import torch
from run_configs import newest
from safetensors.torch import save_file
from tiny_models import SMALL, decoder

from octofold.backends.errors import UserError
from octofold.kernels.reference.block_cast import dequantize_blocks, quantize_blocks
from octofold.parallel.local_ranks import RankError
from octofold.train.checkpoint.quantized import dequantize_window, scale_shape
from octofold.train.checkpoint.reading import CheckpointReader
from octofold.train.checkpoint.weights import publish_weights

BLOCK = 8
MODEL = replace(SMALL, hidden_size=20, moe_intermediate_size=13, n_routed_experts=6, num_nextn_predict_layers=1)
"""Widths that the block does not divide; 6 experts, which 2 ranks split and 4 ranks of FSDP do not."""


def quantised(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """As it is stored: matrices in E4M3 with their scales; all else in BF16 or FP32."""
    if tensor.ndim == 1 or "embed" in name or name.endswith("gate.weight"):
        return {name: tensor.float() if "bias" in name else tensor.bfloat16()}
    data, scales = quantize_blocks(tensor, block=BLOCK)
    return {name: data, f"{name}_scale_inv": scales}


def expected(name: str, tensor: torch.Tensor) -> torch.Tensor:
    stored = quantised(name, tensor)
    if len(stored) == 1:
        return stored[name].double()
    return dequantize_blocks(stored[name], stored[f"{name}_scale_inv"], block=BLOCK).double()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in decoder(MODEL, torch.float32).state_dict().items()}


def publish(run_dir: Path, weights: dict[str, torch.Tensor]) -> Path:
    def write(folder: Path) -> None:
        for part, names in enumerate([list(weights)[::2], list(weights)[1::2]]):
            stored: dict[str, torch.Tensor] = {}
            for name in names:
                stored |= {f"model.{k}": v.contiguous() for k, v in quantised(name, weights[name]).items()}
            save_file(stored, folder / f"model-{part}.safetensors")

    return publish_weights(run_dir, write, {"block": BLOCK})


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 1)])
def test_weights_load_on_any_layout(world, expert, weights, ranks, tmp_path):
    publish(tmp_path, weights)
    for loaded in ranks(world).run(rank_tasks.load_weights, MODEL, expert, tmp_path):
        assert loaded.keys() == weights.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected(name, weights[name])), name


def test_scale_shapes(weights):
    for name, tensor in weights.items():
        stored = quantised(name, tensor)
        if len(stored) == 2:
            assert stored[f"{name}_scale_inv"].shape == scale_shape(tuple(tensor.shape), BLOCK), name


def test_windows_find_their_scales():
    name = "o_proj.weight"
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(26, 19, generator=generator)
    stored, values = quantised(name, whole), expected(name, whole)
    for first_row, first_column in [(0, 0), (5, 3), (13, 8), (25, 18)]:
        rows, columns = slice(first_row, first_row + 9), slice(first_column, first_column + 7)
        part = dequantize_window(
            stored[name][rows, columns],
            stored[f"{name}_scale_inv"],
            block=BLOCK,
            first_row=first_row,
            first_column=first_column,
        )
        assert torch.equal(part.double(), values[rows, columns])


def test_missing_scales_and_tensors_are_named(weights, ranks, tmp_path):
    some = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    publish(tmp_path, {**some, "stranger": torch.ones(2, 2)})
    with pytest.raises(RankError) as caught:
        ranks(1).run(rank_tasks.load_weights, MODEL, 1, tmp_path)
    assert "model.norm.weight: not in the checkpoint" in str(caught.value)
    assert "model.stranger: in the checkpoint only" in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        save_file({"a": torch.ones(1)}, folder / "a.safetensors")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_weights(tmp_path, write, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2), (4, 2), (4, 1)])
def test_windows_of_what_ranks_saved(world, expert, ranks, tmp_path):
    saved: dict[str, Any] = ranks(world).run(rank_tasks.saved_weights, MODEL, expert, tmp_path)[0]
    reader = CheckpointReader(newest(tmp_path))
    assert reader.tensors == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()}
    for name, tensor in saved.items():
        size = len(tensor)
        for first, last in [(0, size), (size // 2, size), (size // 3, size // 3 + 1), (0, 0)]:
            assert torch.equal(reader.read_rows(name, first, last), tensor[first:last]), name
        for place in product(*map(range, tensor.shape[:-2])) if tensor.ndim > 2 else []:
            rows = reader.read_rows(name, 3, tensor.shape[-2] - 2, place=place)
            assert torch.equal(rows, tensor[place][3:-2]), name


def test_a_missing_shard_is_named(ranks, tmp_path):
    ranks(2).run(rank_tasks.saved_weights, MODEL, 1, tmp_path)
    folder = newest(tmp_path)
    sorted(folder.glob("shard-00002*"))[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        CheckpointReader(folder)
