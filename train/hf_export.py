"""From a run's checkpoint to a folder that transformers, vLLM and others load, one slab of a tensor at a time.

FP8 is quantised from the checkpoint's own numbers (FP32 master weights); weights that the checkpoint holds in FP8
already are copied as they are. Neither passes through BF16.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from octofold.backends.errors import ConfigError, UserError, check_finite, unknown_name_error
from octofold.kernels.reference.block_cast import quantize_blocks
from octofold.train.build import model_config
from octofold.train.checkpoint.folders import Folder
from octofold.train.checkpoint.quantized import SCALE_SUFFIX, dequantize_window, scale_shape
from octofold.train.checkpoint.reading import CheckpointReader
from octofold.train.checkpoint.safetensors_files import OutputTensor, slabs_of
from octofold.train.config import RunConfig
from octofold.train.data.tokenizer import Tokenizer, load_saved_tokenizer
from octofold.train.hf_card import Facts, model_card
from octofold.train.hf_files import finite, published, refuse, write_shards
from octofold.train.hf_import import SOURCE
from octofold.train.hf_tokenizer import write_tokenizer
from octofold.train.models.config import ModelConfig
from octofold.train.models.hf_config import fp8_quantization, refuse_to_publish, to_hf
from octofold.train.models.hf_names import HfTensor, hf_tensors

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""The dtype of what is not quantised."""
SCALE_FORMATS = ["auto", "float", "ue8m0"]
LARGEST_BLOCK = 4096


@dataclass(frozen=True)
class ExportConfig:
    """The `export` keys."""

    to: str | None = None
    """Folder to write; null: RUN/export/step_N-PRECISION."""
    precision: str = "bf16"
    """bf16, fp32, or fp8: linear layers in E4M3 blocks, all else in BF16."""
    block: int | None = None
    """Edge of the FP8 blocks; null: what an imported checkpoint holds, else 128, which all published readers expect."""
    scale_fmt: str = "auto"
    """float: FP32 scales (DeepSeek-V3); ue8m0: powers of two (V3.1); auto: what an import held, else float."""
    shard_gb: float = 5.0
    """Size of a file, about."""
    mtp: bool = True
    """Also the layers of multi-token prediction."""
    license: str = "unknown"
    """For the model card: an identifier such as apache-2.0."""


def check(export: ExportConfig) -> None:
    """Raise `ConfigError` for settings that nothing can be written with."""
    if export.precision not in PRECISIONS:
        raise unknown_name_error("export.precision", export.precision, list(PRECISIONS))
    if export.scale_fmt not in SCALE_FORMATS:
        raise unknown_name_error("export.scale_fmt", export.scale_fmt, SCALE_FORMATS)
    if export.block is not None and not 1 <= export.block <= LARGEST_BLOCK:
        raise ConfigError("export.block", export.block, f"1 to {LARGEST_BLOCK}", "export.block=128")
    check_finite("export.shard_gb", export.shard_gb, least=1e-6)


def export_weights(run_dir: Path, checkpoint: Folder, config: RunConfig, export: ExportConfig) -> Path:
    """Write the checkpoint as a Hugging Face folder; returns the folder.

    Raises:
        UserError: naming every tensor that is missing, unknown, misshaped or not finite; or the target exists, or the
            disk is full. Nothing half-written is left behind.
    """
    check(export)
    target = Path(export.to).expanduser().absolute() if export.to else None
    target = target or run_dir / "export" / f"{checkpoint.name}-{export.precision}"
    reader = CheckpointReader(checkpoint)
    tokenizer = load_saved_tokenizer(run_dir / "tokenizer") if (run_dir / "tokenizer").is_dir() else None
    model = _model(config, tokenizer)
    tensors = list(hf_tensors(model))
    check_tensors(reader, tensors)
    export = replace(export, block=export.block or reader.state.get("block") or 128)
    assert export.block is not None
    if not export.mtp:
        beyond = tuple(f"model.layers.{model.num_hidden_layers + d}." for d in range(model.num_nextn_predict_layers))
        tensors = [tensor for tensor in tensors if not tensor.name.startswith(beyond)]
        model = replace(model, num_nextn_predict_layers=0)
    refuse_to_publish(model)
    power_of_two = _power_of_two(reader, export)
    writer = _Writer(reader, export, power_of_two)
    with published(target) as folder:
        # A tied head is said in config.json; only multi-token prediction repeats what it shares.
        kept = [tensor for tensor in tensors if not (tensor.copy and tensor.name == "lm_head.weight")]
        outputs = [output for tensor in kept for output in writer.outputs(tensor)]
        places = write_shards(folder, outputs, shard_bytes=int(export.shard_gb * 1e9))
        faults = [f"{name}: holds numbers that are not finite" for name in sorted(writer.not_finite)]
        refuse(checkpoint, faults, rule="weights are finite", remedy="export an earlier checkpoint of the run")
        index = {"metadata": {"total_size": sum(t.nbytes for t in outputs)}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
        quantization = fp8_quantization(block=export.block, power_of_two=power_of_two)
        facts = Facts(
            model=model,
            data=config.data,
            trained_in=config.precision.name,
            state=reader.state,
            precision=export.precision,
            block=export.block,
            power_of_two=power_of_two,
            license=export.license,
            parameters=sum(prod(tensor.shape) for tensor in kept if not tensor.copy),
        )
        _write_texts(folder, facts, run_dir, tokenizer, quantization if export.precision == "fp8" else None)
    return target


def _model(config: RunConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    if tokenizer is None and not config.model.vocab_size:
        raise UserError(
            "RUN/tokenizer is missing\n  rule:   model.vocab_size=0 takes the tokenizer's size\n"
            "  remedy: restore the folder that the run wrote at its start"
        )
    return model_config(config.model, tokenizer.vocab_size if tokenizer else 0)


def check_tensors(reader: CheckpointReader, tensors: list[HfTensor]) -> None:
    """Raise `UserError` naming every tensor of the checkpoint that is missing, unknown or misshaped."""
    wanted: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.copy:
            continue
        name = f"model.{tensor.ours}"
        # The last of a stack says the size of the whole.
        wanted[name] = (*(index + 1 for index in tensor.place), *tensor.shape)
    faults = []
    for name, shape in wanted.items():
        dtype, found = reader.tensors.get(name, (None, None))
        if found != shape:
            shown = "missing" if found is None else f"{list(found)}"
            faults.append(f"{name}: {shown}, {list(shape)} expected")
        elif dtype == torch.float8_e4m3fn:
            scales = scale_shape(shape, reader.state["block"])
            if reader.tensors.get(name + SCALE_SUFFIX, (None, None))[1] != scales:
                faults.append(f"{name}{SCALE_SUFFIX}: missing or misshaped, {list(scales)} expected")
    faults += [
        f"{name}: unknown, {list(shape)}"
        for name, (_, shape) in reader.tensors.items()
        if name.startswith("model.") and name not in wanted and name.removesuffix(SCALE_SUFFIX) not in wanted
    ]
    rule = "the checkpoint holds the model that RUN/config.yaml describes"
    refuse(reader.folder, faults, rule=rule, remedy="restore config.yaml, or export another checkpoint")


def _power_of_two(reader: CheckpointReader, export: ExportConfig) -> bool:
    """Whether scales are powers of two."""
    return (reader.state.get("scale_fmt") if export.scale_fmt == "auto" else export.scale_fmt) == "ue8m0"


class _Writer:
    """Makes the tensors to be written from those of a checkpoint."""

    def __init__(self, reader: CheckpointReader, export: ExportConfig, power_of_two: bool) -> None:
        self.reader, self.export, self.power_of_two = reader, export, power_of_two
        self.not_finite: set[str] = set()
        """Of the checkpoint's tensors, filled in while slabs are read."""
        held = reader.state.get("scale_fmt")
        wanted = "ue8m0" if power_of_two else "float"
        self.block = export.block or 0
        self.copies_fp8 = reader.state.get("block") == export.block and held == wanted

    def outputs(self, tensor: HfTensor) -> Iterator[OutputTensor]:
        """The published tensor and, if it is quantised, its scales behind it."""
        dtype, _ = self.reader.tensors[f"model.{tensor.ours}"]
        if self.export.precision != "fp8" or not tensor.quantised:
            out = dtype if tensor.exact and dtype != torch.float64 else PRECISIONS[self.export.precision]
            out = torch.float32 if tensor.exact and dtype == torch.float64 else out
            yield OutputTensor(tensor.name, out, tensor.shape, partial(self._cast, tensor, out))
            return
        scale_dims = scale_shape(tensor.shape, self.block)
        name = tensor.name + SCALE_SUFFIX
        if dtype == torch.float8_e4m3fn and self.copies_fp8:
            scales = self.reader.tensors[f"model.{tensor.ours}{SCALE_SUFFIX}"][0]
            yield OutputTensor(tensor.name, dtype, tensor.shape, partial(self._stored, tensor))
            yield OutputTensor(name, scales, scale_dims, lambda: [self._scales(tensor)])
            return
        # The scales come to light with the data, which is written first.
        found: list[torch.Tensor] = []
        yield OutputTensor(tensor.name, torch.float8_e4m3fn, tensor.shape, partial(self._quantise, tensor, found))
        yield OutputTensor(name, torch.float32, scale_dims, partial(_drained, found))

    def _cast(self, tensor: HfTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for first, last in self._windows(tensor):
            yield self._values(tensor, first, last).to(dtype)

    def _quantise(self, tensor: HfTensor, found: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for first, last in self._windows(tensor):
            values = self._values(tensor, first, last)
            if not finite(values):
                # It is named at the end, and nothing of what is written here stays.
                values = torch.nan_to_num(values.float(), posinf=0.0, neginf=0.0)
            data, scale = quantize_blocks(values, block=self.block, power_of_two=self.power_of_two)
            found.append(scale)
            yield data

    def _stored(self, tensor: HfTensor) -> Iterator[torch.Tensor]:
        for first, last in self._windows(tensor):
            yield self._rows(tensor, first, last)

    def _windows(self, tensor: HfTensor) -> Iterator[tuple[int, int]]:
        # Counted in FP32, which is what a slab becomes on its way.
        return slabs_of(tensor.shape[0], 4 * (tensor.shape[1] if len(tensor.shape) > 1 else 1), self.block)

    def _rows(self, tensor: HfTensor, first: int, last: int) -> torch.Tensor:
        """Rows of the tensor as they are stored."""
        rows = self.reader.read_rows(f"model.{tensor.ours}", first, last, place=tensor.place)
        if not finite(rows):
            self.not_finite.add(f"model.{tensor.ours}" + "".join(f"[{expert}]" for expert in tensor.place[:1]))
        return rows

    def _values(self, tensor: HfTensor, first: int, last: int) -> torch.Tensor:
        """The same as numbers."""
        rows = self._rows(tensor, first, last)
        if rows.dtype != torch.float8_e4m3fn:
            return rows
        return dequantize_window(rows, self._scales(tensor), block=self.reader.state["block"], first_row=first)

    def _scales(self, tensor: HfTensor) -> torch.Tensor:
        """Scales of the published tensor."""
        name = f"model.{tensor.ours}{SCALE_SUFFIX}"
        scales = self.reader.read_rows(name, 0, self.reader.tensors[name][1][-2], place=tensor.place)
        if not finite(scales):
            self.not_finite.add(name)
        return scales


def _drained(found: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What has been found, which is then let go."""
    while found:
        yield found.pop(0)


def _write_texts(
    folder: Path, facts: Facts, run_dir: Path, tokenizer: Tokenizer | None, quantization: dict[str, Any] | None
) -> None:
    """Everything but weights: config.json, generation_config.json, tokenizer, model card.

    What came with imported weights goes on as it came, and its token ids into config.json.
    """
    source = run_dir / SOURCE
    came: dict[str, Any] = {}
    if source.is_dir():
        came = json.loads((source / "config.json").read_text())
        for path in source.iterdir():
            if path.name != "config.json":
                shutil.copy(path, folder / path.name)
    elif tokenizer:
        write_tokenizer(folder, run_dir / "tokenizer", tokenizer)
    bos_id, eos_id = came.get("bos_token_id"), came.get("eos_token_id", tokenizer.eos_id if tokenizer else None)
    config = to_hf(
        facts.model,
        dtype="float32" if facts.precision == "fp32" else "bfloat16",
        sequence_length=facts.data.sequence_length,
        bos_id=bos_id,
        eos_id=eos_id,
        quantization=quantization,
    )
    _write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
