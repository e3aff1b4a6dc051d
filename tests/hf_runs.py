"""Runs and Hugging Face checkpoints for the tests of import and export, and the logits of each."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import library
from run_configs import tiny_run, write_corpus
from safetensors.torch import load_file
from tiny_models import positions_of

from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.process_group import RankInfo, joined
from octofold.launch.compose import compose
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import read_config, write_config
from octofold.train.build import build_model
from octofold.train.checkpoint.manager import Checkpointer
from octofold.train.config import PrecisionConfig
from octofold.train.engines.native import model_tensors
from octofold.train.main import train
from octofold.train.models.config import ModelConfig

TOKENS_BS = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))


def preset(name: str, **changed: Any) -> ModelConfig:
    """A preset with fewer layers, and weights so large that a mistake shows in the logits."""
    small = {"num_hidden_layers": 2, "initializer_range": 0.15, **changed}
    return replace(compose([f"model={name}"]).model, **small)


def trained_run(root: Path, model: ModelConfig, precision: str = "fp32", **data: Any) -> Path:
    """A run of two steps, finished, in `root/run`."""
    config = tiny_run(write_corpus(root), precision={"name": precision}, train={"steps": 2}, data=data)
    config = replace(config, model=model)
    train(config, root / "run")
    write_config(root / "run", JobConfig(**vars(replace(config, run_dir=str(root / "run")))))
    return root / "run"


def our_logits(run_dir: Path, ahead: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Of the newest checkpoint, in FP32; given the tokens ahead, those of multi-token prediction behind."""
    config = replace(read_config(run_dir), precision=PrecisionConfig("fp32"))
    with joined(CpuBackend(), BackendConfig(threads=1), RankInfo()), torch.no_grad():
        model = build_model(config, torch.device("cpu"), 257).model
        checkpointer = Checkpointer(run_dir, config.checkpoint, torch.device("cpu"))
        checkpointer.load(run_dir, model_tensors(model), whole=False)
        positions_BS = positions_of(TOKENS_BS)
        model.eval()
        return model(TOKENS_BS, positions_BS, ahead=ahead) if ahead else [model(TOKENS_BS, positions_BS)]


def their_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """What transformers loads, in FP32, and its report on the keys."""
    model, report = library().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # Of an FP8 checkpoint it makes FP32 linear layers and leaves the rest in BF16.
    return model.float().eval(), report


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    """Of the same tokens."""
    logits: torch.Tensor = model(TOKENS_BS, use_cache=False).logits
    return logits


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def all_bytes(folder: Path, pattern: str = "*.safetensors") -> dict[str, bytes]:
    """Every file's contents."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def config_of(folder: Path) -> dict[str, Any]:
    """config.json."""
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document
